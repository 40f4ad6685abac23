"""The cache of scores: a file for everything that scores depend on, believed only where it says so itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from prunesweep.models import load, save, weights_digest
from prunesweep.pruners import Scores
from prunesweep.training import open_data
from prunesweep.training.jobs.scoring import Calibration, cached_scores

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1}
GREY = {"mean": (0.3053,), "std": (0.376,)}


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SHAPE, "num_heads": 2, **changes})
    model.pretrained_cfg |= GREY
    return model.eval()


def score(cache: Path, model: nn.Module, method: str = "magnitude", options: Any = None, **calibration: int) -> Path:
    data = open_data("digits", model.pretrained_cfg)  # type: ignore[arg-type]
    given = Calibration(**{"images": 32, **calibration})
    return cached_scores(model, method, data, given, cache, lambda *_: None, options=options)


def test_models_of_equal_weights_and_other_form_have_scores_of_their_own(tmp_path: Path) -> None:
    models = [make(), make(num_heads=4), make(norm_layer=_norm(1e-3)), make(global_pool="avg", fc_norm=False)]
    assert len({weights_digest(model) for model in models}) == 1
    saved = [load(save(model, tmp_path / f"{i}")) for i, model in enumerate(models)]
    files = {score(tmp_path / "cache", model, "nvit") for model in saved}
    assert len(files) == 4


def _norm(eps: float) -> Callable[[int], nn.LayerNorm]:
    return lambda width, **_: nn.LayerNorm(width, eps=eps)


def test_everything_that_scores_depend_on_is_in_the_key(tmp_path: Path) -> None:
    """One input is changed at a time."""
    weight = make()
    with torch.no_grad():
        weight.head.bias[0] += 1e-3
    files = [
        score(tmp_path, make()),
        score(tmp_path, weight),
        score(tmp_path, make(num_heads=4)),
        score(tmp_path, make(), "taylor"),
        score(tmp_path, make(), images=48),
        score(tmp_path, make(), batch_size=8),
        score(tmp_path, make(), seed=1),
    ]
    assert len(set(files)) == len(files) == len(list(tmp_path.iterdir()))
    assert score(tmp_path, make()) == files[0]


@pytest.mark.parametrize("damage", ["foreign", "cut", "zeros"])
def test_a_file_that_is_not_what_its_name_says_is_made_again(tmp_path: Path, damage: str) -> None:
    path = score(tmp_path, make())
    sound = path.read_bytes()
    found = Scores.load(path)
    wanted = {name: vector.clone() for name, vector in found.vectors.items()}  # what was loaded is a view of the file
    if damage == "foreign":
        path.write_bytes(score(tmp_path, make(num_heads=4)).read_bytes())
    elif damage == "cut":
        path.write_bytes(sound[: len(sound) // 2])
    else:
        path.write_bytes(sound[:-64] + bytes(64))
    assert score(tmp_path, make()) == path
    again = Scores.load(path)
    assert again.provenance == found.provenance
    assert all(torch.equal(again.vectors[name], vector) for name, vector in wanted.items())
    before = path.stat().st_mtime_ns
    score(tmp_path, make())
    assert path.stat().st_mtime_ns == before
