"""Commands on images without labels: quality is agreement with the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from prunesweep.models import load, load_provenance, save
from prunesweep.pruners import Scores, kl_divergence
from prunesweep.training import Recipe, fit, open_data
from tests.launch.test_cli import call

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 2, "num_heads": 2}
GREY = {"mean": (0.3053,), "std": (0.376,), "crop_pct": 1.0, "interpolation": "bilinear"}


def trained(folder: Path) -> Path:
    """A ViT that has learnt a little of the digits."""
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    model.pretrained_cfg |= GREY
    fit(model, open_data("digits"), Recipe(epochs=5, lr=3e-3))
    return save(model, folder)


def pictures(root: Path) -> str:
    """300 of the digits as files, without labels, in folders that mean nothing."""
    for i, image in enumerate(load_digits().images[:300]):
        folder = root / f"day{i % 3}" / f"camera{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    return f"images:{root}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pictures(tmp_path_factory.mktemp("tree"))


def agreement(source: Path, small: Path, data: str) -> tuple[float, float]:
    """Of the validation split, by plain arithmetic."""
    one, other = load(source), load(small)
    wanted, got = [], []
    with torch.no_grad():
        for x, _ in open_data(data, one.pretrained_cfg).val_loader(32):  # type: ignore[arg-type]
            wanted.append(one(x))
            got.append(other(x))
    a, b = torch.cat(wanted), torch.cat(got)
    return 100 * (a.argmax(1) == b.argmax(1)).double().mean().item(), kl_divergence(a, b).mean().item()


def test_a_front_is_computed_from_a_tree(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path
) -> None:
    out = tmp_path / "front"
    code, text, _ = call(capsys, "instant", source, "--data", tree, "--budgets", "0.6", "--out", out)
    assert code == 0
    assert "source" in text
    whole, point = json.loads((out / "front.json").read_text())["points"]
    assert (whole["top1"], whole["agreement"], whole["images"]) == (None, 100, 75)
    assert (point["agreement"], point["kl"]) == pytest.approx(agreement(source, out / "0.6", tree), rel=1e-4)
    assert "top1" not in load_provenance(out / "0.6")


@pytest.mark.parametrize("method", ["taylor", "nvit", "isomorphic", "upvit", "magnitude"])
def test_methods_prune_without_labels(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path, method: str
) -> None:
    options = ("--data", tree, "--method", method, "--budget", "0.6", "--images", "64", "--cache", tmp_path / "cache")
    code, text, err = call(
        capsys, "prune", source, *options, "--finetune", "none", "--out", tmp_path / "small", "--json"
    )
    assert code == 0, err
    found = json.loads(text)
    assert (found["agreement"], found["kl"]) == pytest.approx(agreement(source, tmp_path / "small", tree), rel=1e-4)
    assert found["source_agreement"] == 100
    assert "top1" not in found
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    assert Scores.load(file).provenance.get("labels") == (
        "drawn" if method in ("taylor", "nvit", "isomorphic") else None
    )


def test_eval_compares_with_a_teacher(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model: Any = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    model.pretrained_cfg |= GREY
    other = save(model, tmp_path / "other")
    code, text, _ = call(capsys, "eval", other, "--teacher", source, "--data", tree, "--json")
    assert code == 0
    found = json.loads(text)
    assert "top1" not in found
    assert (found["agreement"], found["kl"]) == pytest.approx(agreement(source, other, tree), rel=1e-4)
    code, text, _ = call(capsys, "eval", source, "--teacher", source, "--data", "digits")
    assert code == 0
    assert text.startswith("top-1 ")
    assert "KL 0, agreement 100.00 %" in text
    code, _, err = call(capsys, "eval", source, "--data", tree)
    assert code == 2
    assert "has no labels: give the model to compare with, --teacher SOURCE" in err


def test_what_trains_on_labels_says_what_to_do(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path
) -> None:
    code, _, err = call(capsys, "finetune", source, "--data", tree, "--out", tmp_path / "out")
    assert code == 2
    assert "has no labels to train on: set the recipe's loss_weight = 0" in " ".join(err.split())
    options = ("--data", tree, "--method", "uvc", "--budget", "0.6", "--out", tmp_path / "out")
    code, _, err = call(capsys, "prune", source, *options)
    assert code == 2
    assert "'uvc' decides while it trains on labels" in err
    assert not (tmp_path / "out").exists()


def test_a_model_is_distilled_without_labels(source: Path, tree: str) -> None:
    teacher = load(source)
    torch.manual_seed(2)
    student: Any = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    data = open_data(tree, teacher.pretrained_cfg)  # type: ignore[arg-type]
    epochs: list[Any] = []
    recipe = Recipe.model_validate(
        {"epochs": 4, "lr": 3e-3, "batch_size": 24, "loss_weight": 0, "mixup": 0.2, "distill": [{"kind": "soft"}]}
    )
    student.pretrained_cfg |= GREY
    assert fit(student, data, recipe, teacher=teacher, on_epoch=epochs.append)
    first, *_, last = epochs
    assert first.top1 is None
    assert last.agreement > 25
    assert last.kl < first.kl
