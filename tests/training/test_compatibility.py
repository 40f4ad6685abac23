from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm

from prunesweep.models import Arch, UserError
from prunesweep.training import check_fits, open_data

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
DIGITS = open_data("digits")


def arch(**changes: Any) -> Arch:
    return Arch.from_timm(timm.create_model("vit_tiny_patch16_224", **{"num_classes": 10, **SHAPE, **changes}))


def test_a_model_of_the_data_fits() -> None:
    check_fits(arch(), DIGITS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 7}, "^the model has 7 classes, digits has 10: buy another$"),
        ({"num_classes": 11}, "^the model has 11 classes, digits has 10: buy another$"),
        (
            {"in_chans": 3},
            r"^the model takes images of \(3, 8, 8\), digits has \(1, 8, 8\): save one .*, in_chans=1\)$",
        ),
        (
            {"img_size": 16},
            r"^the model takes images of \(1, 16, 16\), digits has \(1, 8, 8\): save one .*, in_chans=1\)$",
        ),
    ],
)
def test_other_models_do_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_fits(arch(**changes), DIGITS, name="the model", remedy="buy another")


def test_numbers_of_classes_may_be_open() -> None:
    """Labels of shards are numbers, and the largest ones need not occur in every selection."""
    data = open_data("digits")
    data.info = dataclasses.replace(data.info, open_ended=True)
    check_fits(arch(num_classes=11), data)
    with pytest.raises(UserError, match="has 7 classes, digits has 10: take data of its classes"):
        check_fits(arch(num_classes=7), data)


def test_words_are_no_images() -> None:
    words = dataclasses.replace(DIGITS.info, vocabulary="abc")
    data = open_data("digits")
    data.info = words
    with pytest.raises(UserError, match="is a model of images, data 'digits' are texts"):
        check_fits(arch(), data)
