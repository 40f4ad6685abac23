"""Commands on saved models in half and double precision: figures in float32, results in the type of the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.models import load, save
from prunesweep.models.precision import dtype_in
from prunesweep.training import Recipe, fit, open_data, seeded

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}
OTHER = (torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(scope="module")
def trained() -> Any:
    with seeded(0):
        model: Any = timm.create_model("vit_tiny_patch16_224", **SHAPE)
        fit(model, open_data("digits", model.pretrained_cfg), Recipe(epochs=6, batch_size=64, lr=3e-3))
    return model


@pytest.fixture(params=OTHER, ids=str)
def source(trained: Any, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.dtype]:
    state, dtype = trained.state_dict(), request.param
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    model.load_state_dict(state)
    model.pretrained_cfg |= trained.pretrained_cfg
    return save(model.to(dtype), tmp_path / "source"), dtype


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result


def check(folder: Path, dtype: torch.dtype, top1: float) -> None:
    """The type is kept, and what was said of the model is true of what was saved."""
    assert {p.dtype for p in load(folder).parameters()} == {dtype}
    found = json.loads(run("eval", folder, "--data", "digits", "--json").stdout)
    assert found["top1"] == pytest.approx(top1, abs=1e-9)


def test_commands(source: tuple[Path, torch.dtype], tmp_path: Path) -> None:
    folder, dtype = source
    common = ("--data", "digits")
    scores = ("--method", "magnitude", "--images", 64, "--cache", tmp_path / "scores")
    run("score", folder, *scores, *common)
    out = tmp_path / "small"
    options = (*scores, *common, "--budget", 0.6, "--group", "mlp=8", "--group", "embed=8", "--group", "heads=1")
    found = json.loads(run("prune", folder, *options, "--out", out, "--json").stdout)
    assert len(list((tmp_path / "scores").iterdir())) == 1
    check(out, dtype, found["top1"])
    tuned = tmp_path / "tuned"
    recipe = ("--set", "batch_size=64", "--epochs", 1)
    found = json.loads(run("finetune", out, *common, "--out", tuned, "--teacher", folder, *recipe, "--json").stdout)
    check(tuned, dtype, found["top1"])
    front = tmp_path / "front"
    run("instant", folder, *common, "--out", front, "--budgets", 0.6, "--images", 256)
    (_, point) = json.loads((front / "front.json").read_text())["points"]
    check(front / point["model"], dtype, point["top1"])


def test_a_method_that_decides_while_it_trains(source: tuple[Path, torch.dtype], tmp_path: Path) -> None:
    folder, dtype = source
    out = tmp_path / "small"
    recipe = ("--set", "recipe.epochs=1", "--set", "recipe.batch_size=64", "--finetune", "none")
    options = ("--method", "pmvit", "--keep-rate", 0.6, "--images", 64, "--cache", tmp_path / "scores")
    run("prune", folder, *options, "--data", "digits", "--out", tmp_path / "planned")
    assert dtype_in(tmp_path / "planned" / "model.safetensors") == dtype
    options = ("--method", "uvc", "--budget", 0.7, *recipe)
    found = json.loads(run("prune", folder, *options, "--data", "digits", "--out", out, "--json").stdout)
    check(out, dtype, found["top1"])
