"""Finetuning in a method's own way, by ``prune`` and by ``finetune``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.models import Cut, UserError, arch_of, cut, load, load_provenance, save, weights_digest
from prunesweep.models.layers.mixers import ConvMixer
from prunesweep.pruners.spvit.choices import spvit_cut
from prunesweep.pruners.spvit.mixed import SPViTMixed
from prunesweep.training import fit, open_data
from prunesweep.training.recipe import Recipe

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 3, "num_heads": 4}
LONG = ("--finetune", "quick", "--set", "finetune.epochs=1", "--set", "finetune.batch_size=128", "--second-stage")
SPVIT = ("--budget", "0.45", "--recipe", "quick", "--set", "recipe.epochs=3", "--set", "recipe.batch_size=128")
GATES = ("--set", "theta_lr=0.1", "--set", "weight=8")
AGAIN = ("--recipe", "quick", "--set", "epochs=1", "--set", "batch_size=128")
runner = CliRunner()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(timm.create_model("vit_tiny_patch16_224", **SHAPE), tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def decided(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SPViT's decision ``decided`` and of its finetuned model ``small``."""
    folder = tmp_path_factory.mktemp("spvit")
    out = prune(source, folder / "decided", "spvit", *SPVIT, *GATES, "--finetune", "none")
    assert out.exit_code == 0, (out.output, out.exception)
    out = prune(source, folder / "small", "spvit", *SPVIT, *GATES, *LONG, "--set", "second_stage.alpha=0.05")
    assert out.exit_code == 0, (out.output, out.exception)
    return folder


def prune(source: Path, out: Path, method: str, *options: str):
    given = ["prune", str(source), "--method", method, "--data", "digits", "--images", "64", "--out", str(out)]
    return runner.invoke(app, [*given, "--cache", str(out.parent / "scores"), *options])


def finetune(model: Path, out: Path, *options: str):
    return runner.invoke(app, ["finetune", str(model), "--data", "digits", "--out", str(out), *AGAIN, *options])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder).state_dict()


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_spvits_convolutions_are_finetuned_mixed_and_frozen_then(source: Path, decided: Path, tmp_path: Path) -> None:
    small = load(decided / "small")
    assert any(isinstance(module, ConvMixer) for module in small.modules())
    assert arch_of(small) == arch_of(load(decided / "decided"))
    facts = load_provenance(decided / "small")
    assert facts["second_stage"] == {"method": "spvit", "settings": {"alpha": 0.05}}
    Cut.from_dict(load_provenance(decided / "decided")["decision"])
    for name, options in {
        "same": ("--second-stage", "spvit", "--set", "second_stage.alpha=0.05"),
        "default": ("--second-stage", "spvit"),
        "plain": (),
    }.items():
        out = finetune(decided / "decided", tmp_path / name, "--teacher", str(source), *options)
        assert out.exit_code == 0, (out.output, out.exception)
    assert same(tmp_path / "same", decided / "small")
    assert not same(tmp_path / "default", decided / "small")
    assert not same(tmp_path / "plain", tmp_path / "default")


def test_a_second_stage_goes_on_from_its_last_epoch(source: Path, tmp_path: Path) -> None:
    dense = load(source)
    decision = spvit_cut(arch_of(dense), ["conv3x3", "conv1x1", "msa"])
    data, recipe = open_data("digits"), Recipe(epochs=2, batch_size=128, lr=1e-3)
    cutting = spvit_models(source, decision)
    for stop in (None, True):
        model, hook = next(cutting)
        state = tmp_path / f"{stop}.safetensors"
        finished = fit(model, data, recipe, hook=hook, state=state, should_stop=None if stop is None else lambda: True)
        if not finished:
            model, hook = next(cutting)
            assert fit(model, data, recipe, hook=hook, state=state)
        assert hook.finish() == 2
        save(model, tmp_path / f"{stop}")
    assert same(tmp_path / "None", tmp_path / "True")


def spvit_models(source: Path, decision: Cut):
    while True:
        dense = load(source)
        yield cut(dense, decision), SPViTMixed(dense, decision)


def test_a_planned_model_trains_its_matrices_alone(source: Path, tmp_path: Path) -> None:
    alone = ("--set", "second_stage.train_weights=false", "--set", "second_stage.train_matrices=recover")
    plain = prune(source, tmp_path / "untrained", "pmvit", "--keep-rate", "0.5")
    assert plain.exit_code == 0, (plain.output, plain.exception)
    out = prune(source, tmp_path / "small", "pmvit", "--keep-rate", "0.5", *LONG, *alone, "--json")
    assert out.exit_code == 0, (out.output, out.exception)
    before, after = weights(tmp_path / "untrained"), weights(tmp_path / "small")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith("token_merge.recover") for name in changed)
    again = finetune(
        tmp_path / "untrained", tmp_path / "both", "--teacher", str(source), "--second-stage", "pmvit", "--json"
    )
    assert again.exit_code == 0, (again.output, again.exception)
    assert json.loads(again.stdout)["macs"] == json.loads(out.stdout)["macs"]
    moved = {name for name, t in weights(tmp_path / "both").items() if not torch.equal(before[name], t)}
    assert {"blocks.0.token_merge.weight", "blocks.0.token_merge.recover", "head.weight"} <= moved


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nvit", ("--budget", "0.6", *LONG), "--second-stage: means nothing to method 'nvit'"),
        (
            "pmvit",
            ("--keep-rate", "0.5", "--second-stage"),
            "is finetuning; give a recipe, for example --finetune pmvit",
        ),
        ("spvit", (*SPVIT, "--finetune", "none", "--second-stage"), "--second-stage: is finetuning; give a recipe"),
        ("pmvit", ("--keep-rate", "0.5", *LONG, "--set", "second_stage.lr=1"), "method 'pmvit': unknown setting 'lr'"),
        ("spvit", (*SPVIT, *LONG, "--set", "second_stage.alpha=0"), "second stage of method 'spvit': alpha = 0"),
        ("pmvit", ("--keep-rate", "0.5", "--set", "second_stage.a=1"), "these settings go with --second-stage"),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    source: Path, tmp_path: Path, method: str, options: tuple[str, ...], message: str
) -> None:
    result = prune(source, tmp_path / "small", method, *options)
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_a_model_is_said(source: Path, decided: Path, tmp_path: Path) -> None:
    model, stage = decided / "decided", ("--second-stage", "spvit")
    torch.manual_seed(1)
    other = save(timm.create_model("vit_tiny_patch16_224", **SHAPE), tmp_path / "other")
    for folder, options, message in (
        (source, (*stage, "--teacher", str(source)), "does not say by what decision it was cut"),
        (model, stage, "needs --teacher"),
        (model, (*stage, "--teacher", str(other)), "was cut from vit_tiny_patch16_224 with other weights"),
        (model, ("--second-stage", "uvc"), "method 'uvc' has no second stage; there is one of spvit, pmvit"),
        (model, ("--second-stage", "spvitt"), "unknown method 'spvitt'; known: .* did you mean 'spvit'"),
        (model, ("--second-stage", "pmvit"), "has no token plan"),
        (model, ("--set", "second_stage.alpha=1"), "give --second-stage METHOD"),
    ):
        result = finetune(folder, tmp_path / "out", *options)
        with pytest.raises(UserError, match=message):
            raise result.exception or AssertionError(result.output)
        assert not (tmp_path / "out").exists()


def mixed_rank(folder: Path) -> float:
    """Fifth singular value over the first of a 3x3 convolution's taps (9, weights): 4 heads mix to rank 4 at most."""
    taps = load(folder).get_parameter("blocks.0.attn.bconv.0.weight").double().flatten(0, 1).flatten(1).T
    values = torch.linalg.svdvals(taps)
    return float(values[4] / values[0])


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Path:
    """What SPViT makes of the source with choices that are given."""
    dense = load(source)
    decision = spvit_cut(arch_of(dense), ["conv3x3", "conv1x1", "msa"])
    facts = {"decision": decision.to_dict(), "source": {"name": "test", "weights": weights_digest(dense)}}
    return save(cut(dense, decision), tmp_path / "made", facts)


def test_mixed_weights_stay_a_mixture_of_heads(source: Path, made: Path, tmp_path: Path) -> None:
    for name, options in (("mixed", ("--second-stage", "spvit")), ("plain", ())):
        out = finetune(made, tmp_path / name, "--teacher", str(source), *options)
        assert out.exit_code == 0, (out.output, out.exception)
    assert mixed_rank(tmp_path / "mixed") < 1e-5 < 1e-3 < mixed_rank(tmp_path / "plain")


@pytest.mark.slow
def test_two_workers_finetune_mixed_weights_too(source: Path, made: Path, tmp_path: Path) -> None:
    given = ("--teacher", str(source), "--second-stage", "spvit", "--workers", "2")
    out = finetune(made, tmp_path / "two", *given)
    assert out.exit_code == 0, (out.output, out.exception)
    assert arch_of(load(tmp_path / "two")) == arch_of(load(made))
    assert not same(tmp_path / "two", made)
    assert mixed_rank(tmp_path / "two") < 1e-5
    assert load_provenance(tmp_path / "two")["second_stage"]["method"] == "spvit"
