"""Commands on a backbone without a head: quality is how close its features are to the source's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from prunesweep.models import arch_of, cost, load, load_provenance, save
from prunesweep.training import Recipe, fit, open_data
from tests.launch.test_cli import call
from tests.launch.test_unlabelled import GREY, SHAPE, pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features behind a classifier that has learnt a little of the digits."""
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    model.pretrained_cfg |= GREY
    fit(model, open_data("digits"), Recipe(epochs=5, lr=3e-3))
    model.reset_classifier(0)
    return save(model, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pictures(tmp_path_factory.mktemp("tree"))


def quality(source: Path, small: Path, data: str) -> tuple[float, float]:
    """Centred cosine and relative squared error on the validation split, by plain arithmetic."""
    one, other = load(source), load(small)
    with torch.no_grad():
        batches = [x for x, _ in open_data(data, one.pretrained_cfg).val_loader(32)]  # type: ignore[arg-type]
        a, b = (torch.cat([model(x) for x in batches]).double().numpy() for model in (one, other))
    mean = a.mean(0)
    a, b = a - mean, b - mean
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosines.mean(), ((a - b) ** 2).sum() / (a**2).sum()


@pytest.mark.parametrize("method", ["magnitude", "random", "taylor", "nvit", "isomorphic", "upvit", "subspaces"])
def test_methods_prune_features(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path, method: str
) -> None:
    options = ("--data", tree, "--method", method, "--budget", "0.4", "--images", 64, "--cache", tmp_path / "cache")
    code, text, err = call(capsys, "prune", source, *options, "--out", tmp_path / "small", "--json")
    assert code == 0, err
    found, small = json.loads(text), arch_of(load(tmp_path / "small"))
    assert small.outputs == arch_of(load(source)).outputs
    assert small.feature_head == (small.stages[0].width < small.outputs)
    assert small.feature_head or method not in ("random", "magnitude")
    assert (found["cosine"], found["relative_error"]) == pytest.approx(
        quality(source, tmp_path / "small", tree), rel=1e-4
    )
    assert (found["source_cosine"], found["source_relative_error"]) == (pytest.approx(1), 0)
    assert not {"top1", "kl", "agreement"} & found.keys()
    assert 0.99 < found["macs"] / (0.4 * cost(arch_of(load(source))).macs) <= 1
    assert found["recovery"]["as_cut"]["cosine"] < found["recovery"]["cosine"] == found["cosine"]


def test_a_pruned_backbone_says_how_it_recovered(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    """On labelled data too, whose labels are no answers of the model."""
    options = ("--data", "digits", "--method", "magnitude", "--budget", "0.6", "--cache", tmp_path / "cache")
    code, text, err = call(capsys, "prune", source, *options, "--out", tmp_path / "small")
    assert code == 0, err
    text = " ".join(text.split())
    assert "recovered by refits on 512 images: cosine to the source's features" in text
    assert "cosine 1.0000, relative error 0" in text
    assert "top-1" not in text


def test_a_front_of_features_is_computed_from_a_tree(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path
) -> None:
    out = tmp_path / "front"
    code, text, err = call(capsys, "instant", source, "--data", tree, "--budgets", "0.6,0.3", "--out", out)
    assert code == 0, err
    assert "measured on 75 validation images" in " ".join(text.split())
    assert "relative error" in text
    assert "KL" not in text
    whole, *points = json.loads((out / "front.json").read_text())["points"]
    assert (whole["cosine"], whole["relative_error"], whole["kl"]) == (pytest.approx(1), 0, None)
    for point in points:
        folder = out / point["model"]
        assert (point["cosine"], point["relative_error"]) == pytest.approx(quality(source, folder, tree), rel=1e-4)
        assert point["cosine"] > 0.9
        provenance, small = load_provenance(folder), timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert provenance["cosine"] == point["cosine"]
        assert "kl" not in provenance
        assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 24)
        assert 0.98 < point["macs"] / (point["budget"] * whole["macs"]) <= 1


def test_eval_compares_features_with_the_source_s(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model: Any = timm.create_model("vit_tiny_patch16_224", **(SHAPE | {"num_classes": 0}))
    model.pretrained_cfg |= GREY
    other = save(model, tmp_path / "other")
    for data in (tree, "digits"):
        code, text, err = call(capsys, "eval", other, "--teacher", source, "--data", data, "--json")
        assert code == 0, err
        found = json.loads(text)
        assert (found["cosine"], found["relative_error"]) == pytest.approx(quality(source, other, data), rel=1e-4)
        assert not {"top1", "kl", "agreement"} & found.keys()
        code, _, err = call(capsys, "eval", other, "--data", data)
        assert code == 2
        assert "--teacher SOURCE" in err
    model.reset_classifier(24)
    code, _, err = call(capsys, "eval", other, "--teacher", save(model, tmp_path / "headed"), "--data", "digits")
    assert code == 2
    assert "has 24 classes" in err


def test_features_are_distilled(capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path) -> None:
    """Into a model whose stream is narrower, by its map; losses that need answers say what to set."""
    small, out = tmp_path / "small", tmp_path / "out"
    options = ("--data", tree, "--method", "random", "--budget", "0.3", "--no-recover", "--cache", tmp_path / "cache")
    assert call(capsys, "prune", source, *options, "--out", small)[0] == 0
    train = ("finetune", small, "--data", tree, "--teacher", source, "--out", out, "--set", "batch_size=24")
    wrong = [(), ("--set", "loss_weight=0", "--set", 'distill=[{kind="soft"}]')]
    for settings in wrong:
        code, _, err = call(capsys, *train, *settings)
        assert code == 2
        assert "so it gives features and no answers: set the recipe's loss_weight = 0" in " ".join(err.split())
    right = ("--set", "loss_weight=0", "--set", 'distill=[{kind="feature"}]', "--epochs", "4", "--set", "lr=3e-3")
    code, text, err = call(capsys, *train, *right, "--json")
    assert code == 0, err
    before, after = (quality(source, folder, tree) for folder in (small, out))
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert json.loads(text)["cosine"] == pytest.approx(after[0], rel=1e-4) == load_provenance(out)["cosine"]
    assert arch_of(load(out)) == arch_of(load(small))


def test_a_recipe_that_needs_answers_is_refused_before_pruning(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path
) -> None:
    options = ("--data", tree, "--method", "random", "--budget", "0.5", "--cache", tmp_path / "cache")
    code, _, err = call(capsys, "prune", source, *options, "--finetune", "quick", "--out", tmp_path / "small")
    assert code == 2
    assert "has no head, so it gives features and no answers" in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_recipe_gentle_learns_features_and_keeps_the_closest(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path
) -> None:
    options = ("--data", tree, "--method", "random", "--budget", "0.3", "--project", "--cache", tmp_path / "cache")
    train = ("--finetune", "gentle", "--set", "finetune.epochs=1", "--out", tmp_path / "small", "--json")
    code, text, err = call(capsys, "prune", source, *options, *train)
    assert code == 0, err
    found = json.loads(text)
    assert (found["cosine"], found["relative_error"]) == pytest.approx(
        quality(source, tmp_path / "small", tree), rel=1e-4
    )
    assert load_provenance(tmp_path / "small")["kept"]["held_out_relative_error"]


def test_tokens_are_merged_without_training(capsys: pytest.CaptureFixture[str], source: Path, tree: str) -> None:
    """The model that merges wraps the backbone."""
    code, text, err = call(capsys, "prune", source, "--data", tree, "--method", "tome", "--r", "1", "--json")
    assert code == 0, err
    assert 0.9 < json.loads(text)["cosine"] <= 1


def test_methods_that_train_on_labels_are_refused(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    options = ("--data", "digits", "--method", "uvc", "--budget", "0.6", "--out", tmp_path / "out")
    code, _, err = call(capsys, "prune", source, *options)
    assert code == 2
    assert "'uvc' decides while it trains on labels" in err
    assert "has no head: give it a classifier, or take a method that scores" in " ".join(err.split())


def test_tokens_of_a_backbone_are_planned(
    capsys: pytest.CaptureFixture[str], source: Path, tree: str, tmp_path: Path
) -> None:
    options = ("--data", tree, "--method", "pmvit", "--keep-rate", "0.7", "--images", 64, "--cache", tmp_path / "cache")
    code, text, err = call(
        capsys, "prune", source, *options, "--finetune", "none", "--out", tmp_path / "small", "--json"
    )
    assert code == 0, err
    assert json.loads(text)["cosine"] == pytest.approx(quality(source, tmp_path / "small", tree)[0], rel=1e-4)


def test_features_are_measured_by_labels(capsys: pytest.CaptureFixture[str], source: Path, tree: str) -> None:
    tops = []
    for quality in ("knn", "probe"):
        code, text, err = call(capsys, "eval", source, "--data", "digits", "--quality", quality, "--json")
        assert code == 0, err
        found = json.loads(text)
        assert found["images"] == 450
        assert found[f"{quality}_top1_low"] < found[f"{quality}_top1"] < found[f"{quality}_top1_high"]
        tops.append(found[f"{quality}_top1"])
    assert min(tops) > 25  # of ten classes; it has learnt a little
    code, text, _ = call(capsys, "eval", source, "--data", "digits", "--quality", "knn")
    assert (code, f"k-NN top-1 {tops[0]:.2f} % (" in text) == (0, True)
    for options, reason in (
        (("--data", tree), "the data have no labels"),
        (("--data", "digits", "--teacher", source), "give one of them"),
    ):
        code, _, err = call(capsys, "eval", source, *options, "--quality", "knn")
        assert (code, reason in " ".join(err.split())) == (2, True)
