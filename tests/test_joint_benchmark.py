"""What the benchmark of the joint search computes of fronts."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.joint import (
    BEST,
    BUDGETS,
    DIGITS,
    PARTS,
    RESULT,
    SPACES,
    WIDE,
    WORST,
    Member,
    outside,
    picture,
    settings,
    volumes,
    within,
)
from benchmarks.pictures import DOCS
from prunesweep.search.config import load_config
from prunesweep.search.execution.checks import check_not_in_vain


def member(macs: float, kl: float, right: float = 0.9, images: int = 400) -> Member:
    spread = np.linspace(0.5, 1.5, images)
    return Member(macs, kl * spread, kl * spread, (np.arange(images) < round(right * images)).astype(float), "", {})


def test_a_space_of_some_axes_leaves_all_others_as_they_are() -> None:
    config = load_config(DIGITS, WIDE)
    alone = settings(config, "tokens", 9, trained=False)
    assert (alone.space.budget, alone.space.skip, alone.space.conv, alone.space.mlp_weight) == (
        (1, 1),
        (0, 0),
        (0, 0),
        (1, 1),
    )
    assert alone.space.keep_rate == config.space.keep_rate
    assert settings(config, "joint", 9, trained=False).space == config.space
    without = settings(config, "without blocks", 9, trained=True)
    assert without.space.model_copy(update={"skip": config.space.skip}) == config.space
    assert set(SPACES["without blocks"]) == set(PARTS) - {"blocks"}


@pytest.mark.parametrize("trained", [False, True])
def test_searches_are_what_a_search_takes(trained: bool) -> None:
    config = load_config(DIGITS, WIDE)
    own = settings(config, "joint", 48, trained=trained)
    check_not_in_vain(own)
    assert own.search.reduction_factor == (config.search.reduction_factor if trained else 48)


def test_a_hypervolume_is_the_share_of_the_square_that_a_front_covers() -> None:
    assert volumes([]) == {"kl": 0, "loss": 0, "top1": 0}
    best = volumes([member(0.03, BEST / 2, 1.0)])
    assert best == pytest.approx({"kl": 1, "loss": 1, "top1": 1})
    half = volumes([member(0.03**0.5, (BEST * WORST) ** 0.5, 0.55)])
    assert half == pytest.approx({"kl": 0.25, "loss": 0.25, "top1": 0.25}, abs=1e-3)
    assert volumes([member(1.0, 0.01)])["kl"] == 0


def test_a_member_is_outside_where_nothing_as_cheap_is_as_good_within_the_noise() -> None:
    good = member(0.5, 0.01, 0.98)
    assert outside(good, [member(0.4, 0.02, 0.9), member(0.9, 0.001, 1.0)]) == {"kl": True, "loss": True, "top1": True}
    assert outside(good, [member(0.4, 0.02, 0.9), member(0.5, 0.01, 0.975)]) == {
        "kl": False,
        "loss": False,
        "top1": False,
    }
    assert outside(good, [])["kl"]


def test_within_a_budget_counts_the_largest_member() -> None:
    front = [member(0.1, 0.5), member(0.3, 0.2), member(0.6, 0.1)]
    assert within(front, 0.4) == pytest.approx(0.2)
    assert within(front, 0.05) is None


def test_the_picture_has_a_line_for_every_space_that_was_searched() -> None:
    found = {"within": {str(budget): 0.01 / budget for budget in BUDGETS}}
    row = {"images": 1204, "spaces": {"joint": found, "widths": found}}
    texts = [element.text for element in ElementTree.fromstring(picture([row, row])).iter() if element.text]
    assert {"joint", "widths"} <= set(texts)
    assert "tokens" not in texts


def test_the_picture_is_that_of_the_results() -> None:
    for name, trained in (("joint", False), ("joint_trained", True)):
        rows = json.loads(RESULT.with_name(f"{name}.json").read_text())["seeds"]
        assert (DOCS / f"{name}.svg").read_text() == picture(rows, trained=trained), name
