from __future__ import annotations

from pathlib import Path

import pytest

from prunesweep.models import UserError
from prunesweep.training import Recipe, load_recipe, recipe_names


def test_every_named_recipe_is_one() -> None:
    published = {"isomorphic", "nvit", "pmvit", "revit_scratch", "spvit", "spvit_distilled", "upvit", "uvc_stage2"}
    assert published | {"quick"} <= set(recipe_names())
    for name in recipe_names():
        assert isinstance(load_recipe(name), Recipe)


@pytest.mark.parametrize(
    ("name", "epochs", "peak"),
    [("nvit", 300, 1.8e-3), ("spvit", 130, 1e-4), ("spvit_distilled", 200, 1e-4), ("revit_scratch", 300, 2.5e-4)],
)
def test_published_schedules(name: str, epochs: int, peak: float) -> None:
    recipe = load_recipe(name)
    assert recipe.epochs == epochs
    assert recipe.peak_lr == pytest.approx(peak)


def test_fields_can_be_replaced_and_files_read(tmp_path: Path) -> None:
    assert load_recipe("upvit", {"epochs": 3, "lr": 1e-4}).epochs == 3
    own = tmp_path / "own.toml"
    own.write_text('epochs = 2\n[[distill]]\nkind = "hard"\n')
    assert load_recipe(str(own)).distill[0].kind == "hard"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("upvitt", {}, "unknown recipe 'upvitt'; known: gentle, gentle_pretrained, isomorphic.* did you mean 'upvit'"),
        ("nowhere.toml", {}, "nowhere.toml: no such file"),
        ("quick", {"epoch": 3}, "epoch: unknown field; known: .* did you mean 'epochs'"),
        ("quick", {"lr": -1}, "lr = -1: "),
        ("quick", {"warmup_epochs": 3}, "warmup_epochs = 3: must be below epochs = 3"),
        ("quick", {"accumulate": 5}, "must be a multiple of accumulate = 5"),
        ("quick", {"amp": "fp8"}, "amp = 'fp8': "),
    ],
)
def test_errors_name_the_field(name: str, fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(name, fields)
