"""The table of methods, what follows from it, and methods that come from outside the package."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import BaseModel
from torch import nn
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.models import UserError, arch_of, cost, cut, load, load_provenance, save
from prunesweep.models.families import FAMILIES
from prunesweep.pruners import (
    METHODS,
    AppliedMethod,
    Method,
    ScoredMethod,
    Scores,
    TokenMethod,
    TrainedMethod,
    WidthMethod,
    get_method,
    method_names,
    pmvit,
    register,
    spvit,
    upvit,
    uvc,
    vector_sizes,
)
from prunesweep.search.config import parse_config
from prunesweep.training.recipe import recipe_names
from tests import contract_pruner
from tests.generate import random_model
from tests.pruners.test_semi_structured import is_2_4

README = Path(__file__).parents[2] / "README.md"
KINDS = (WidthMethod, TokenMethod, TrainedMethod, AppliedMethod)
SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 4}
runner = CliRunner()


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_is_whole(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert sum(isinstance(method, kind) for kind in KINDS) == 1
    assert method.paper
    assert method.description.strip()
    assert not method.description.endswith(".")
    assert {method.recipe, method.finetune} - {None} <= set(recipe_names())
    models = [method.settings(), *([method.second_stage.settings()] if method.second_stage else [])]
    for model in models:
        assert model.model_config["extra"] == "forbid"
        assert all(field.description for field in model.model_fields.values()), model


def test_families_are_those_that_the_methods_themselves_accept() -> None:
    own = {"uvc": uvc.FAMILIES, "spvit": spvit.choices.FAMILIES, "pmvit": pmvit.FAMILIES}
    assert {name: list(METHODS[name].families) for name in own} == {name: list(own[name]) for name in own}
    assert get_method("pmvit", TokenMethod).kinds == pmvit.KINDS


def test_settings_are_what_scoring_and_deciding_take() -> None:
    """Names and defaults; everything that has a setting is an argument of the one or the other."""
    for method in METHODS.values():
        if isinstance(method, WidthMethod):
            deciding = set(method.option_names) - set(method.score_options)
            assert set(method.score_options) <= parameters(method.score)
            assert deciding <= parameters(method.decide)
            assert ("seed" in parameters(method.score)) == method.seeded
            assert "seed" not in method.option_names
            for name in method.option_names:
                function = method.score if name in method.score_options else method.decide
                default = inspect.signature(function).parameters[name].default
                assert method.settings().model_fields[name].default == default
    assert set(upvit.IMPORTANCES) == {"exact", "fisher", "hybrid"}


def test_a_name_is_looked_up_among_its_kind() -> None:
    assert get_method("uvc", TrainedMethod).name == "uvc"
    assert get_method("nvit", Method) is METHODS["nvit"]
    assert method_names() == list(METHODS)
    assert method_names(TokenMethod) == ["pmvit"]
    with pytest.raises(UserError, match="unknown method 'uvvc'; known: uvc, spvit, nvit-iterative. did you mean 'uvc'"):
        get_method("uvvc", TrainedMethod)
    with pytest.raises(UserError, match="method 'uvc' decides while it trains; needed here is one of nvit, .*, pmvit"):
        get_method("uvc", ScoredMethod)


def test_the_readme_has_a_row_for_every_method() -> None:
    lines = README.read_text().split("## Methods\n", 1)[1].split("\n## ", 1)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    want = [[f"`{m.name}`", m.when, m.description, ", ".join(m.families), m.paper] for m in METHODS.values()]
    assert rows == want


class ToySettings(BaseModel, extra="forbid"):
    power: float = 1.0


def toy_score(model: nn.Module, batches: Any, *, power: float = 1.0, progress: Any = None) -> Scores:
    """Units rise in importance with their index."""
    arch = arch_of(model)
    vectors = {
        name: (1.0 + torch.arange(size, dtype=torch.float64)) ** power
        for name, size in vector_sizes(arch, ("embed", "heads", "qk", "v", "mlp")).items()
    }
    return Scores(vectors, {"method": "toy", "arch": arch.hash})


@pytest.fixture
def toy() -> Iterator[WidthMethod]:
    method = WidthMethod(
        name="toy",
        description="units count by their index",
        paper="none",
        families=("vit",),
        kinds=("embed", "heads", "qk", "v", "mlp"),
        score=toy_score,
        settings=lambda: ToySettings,
        score_options=("power",),
    )
    register(method)
    yield method
    del METHODS["toy"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(timm.create_model("vit_tiny_patch16_224", **SHAPE), tmp_path_factory.mktemp("source") / "model")


def prune(source: Path, out: Path, *options: str, method: str = "toy"):
    arguments = ["prune", str(source), "--method", method, "--data", "digits", "--out", str(out / "small")]
    return runner.invoke(app, [*arguments, "--cache", str(out / "scores"), "--images", "64", *options])


def test_a_method_from_outside_is_one_of_them(toy: WidthMethod, source: Path, tmp_path: Path) -> None:
    groups = [f"--group={kind}=1" for kind in ("embed", "heads", "qk", "v", "mlp")]
    result = prune(source, tmp_path, "--budget", "0.6", *groups, "--set", "power=2")
    assert result.exit_code == 0, (result.output, result.exception)
    small = arch_of(load(tmp_path / "small"))
    assert cost(small).macs <= 0.6 * cost(arch_of(load(source))).macs
    assert load_provenance(tmp_path / "small")["settings"] == {"power": 2}
    (file,) = (tmp_path / "scores").iterdir()
    assert file.name.startswith("toy-")
    assert Scores.load(file).vectors["blocks.0.mlp"][-1] == 128.0**2
    assert "toy: units count by their index" in runner.invoke(app, ["prune", "--help"]).output
    assert "toy: units count by their index" in runner.invoke(app, ["score", "--help"]).output
    config = {"name": "t", "data": {"name": "digits"}, "source": {"model": "vit_tiny_patch16_224", "pretrained": True}}
    assert parse_config(config | {"scores": {"method": "toy"}, "space": {"methods": ["toy", "nvit"]}}, "t")
    with pytest.raises(ValueError, match="there is a method 'toy' already"):
        register(toy)


def test_what_is_registered_no_more_is_unknown(source: Path, tmp_path: Path) -> None:
    assert "--method toy: must be one of nvit" in str(prune(source, tmp_path, "--budget", "0.6").exception)


def test_help_lists_methods_by_when_they_decide() -> None:
    text = " ".join(runner.invoke(app, ["prune", "--help"], terminal_width=400).output.split())
    assert all(f"{name}: {method.description}" in text for name, method in METHODS.items())
    assert "uvc:" not in runner.invoke(app, ["score", "--help"]).output


def test_settings_of_scoring_reach_it_and_name_its_file(source: Path, tmp_path: Path) -> None:
    found = {}
    for importance in ("fisher", "exact"):
        out = tmp_path / importance
        setting = f"importance={importance}"
        result = prune(source, out, "--budget", "0.9", "--images=8", "--set", setting, "--json", method="upvit")
        assert result.exit_code == 0, (result.output, result.exception)
        (file,) = (out / "scores").iterdir()
        found[file.name] = Scores.load(file).provenance
        assert json.loads(result.stdout)["model"] == str(out / "small")
    assert {facts["importance"] for facts in found.values()} == {"fisher", "exact"}
    assert len(found) == 2
    result = prune(source, tmp_path, "--budget", "0.9", "--set", "round_to=4", method="isomorphic")
    assert result.exit_code == 0, (result.output, result.exception)
    assert all(block.mlp % 4 == 0 for block in arch_of(load(tmp_path / "small")).blocks)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("upvit", "importance=none", "method 'upvit': importance = 'none'"),
        ("upvit", "importanse=exact", "method 'upvit': unknown setting 'importanse'. did you mean 'importance'?"),
        ("isomorphic", "round_to=0", "method 'isomorphic': round_to = 0"),
        ("pmvit", "keep_rate=0.5", "method 'pmvit': unknown setting 'keep_rate'"),
        ("uvc", "budgets=[0.5]", "method 'uvc': unknown setting 'budgets'"),
    ],
)
def test_settings_that_are_not_allowed(source: Path, tmp_path: Path, method: str, setting: str, message: str) -> None:
    result = prune(source, tmp_path, "--budget", "0.9", "--set", setting, method=method)
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert message in str(result.exception)
    assert not (tmp_path / "small").exists()


def test_two_of_four_weights_are_zeroed(source: Path, tmp_path: Path) -> None:
    result = prune(source, tmp_path, "--json", method="2:4")
    assert result.exit_code == 0, (result.output, result.exception)
    facts, model = json.loads(result.stdout), load(tmp_path / "small")
    assert arch_of(model) == arch_of(load(source))
    assert facts["macs"] == cost(arch_of(model)).macs
    change = load_provenance(tmp_path / "small")["change"]
    modules = dict(model.named_modules())
    assert set(change["pruned"]) == {n for n, m in modules.items() if isinstance(m, nn.Linear) and n != "head"}
    assert all(is_2_4(modules[name].weight) for name in change["pruned"])
    assert change["skipped"] == {"head": "10 outputs: not a multiple of 16"}
    for options, message in (
        (("--budget", "0.5"), "--budget: means nothing to method '2:4'"),
        (("--finetune", "quick"), "method '2:4' is evaluated as it is: it takes no --finetune"),
        (("--set", "a=1"), "--set: means nothing to method '2:4'"),
    ):
        assert message in str(prune(source, tmp_path / "again", *options, method="2:4").exception)


@pytest.mark.parametrize("name", METHODS)
def test_every_family_is_served_or_refused_with_the_reason(name: str) -> None:
    """What ``method.families`` says, and so the README; ``test_contract`` has the width methods."""
    method = METHODS[name]
    for family in FAMILIES:
        drawn = arch_of(contract_pruner.source(family, 7, attn_norm=False, mlp_norm=False))
        stages = tuple(
            dataclasses.replace(s, blocks=tuple(dataclasses.replace(b, mlp=64) for b in s.blocks)) for s in drawn.stages
        )  # groups of units can go
        arch = dataclasses.replace(drawn, stages=stages)
        model = random_model(arch, 0, torch.float32)
        if family not in method.families:
            with pytest.raises(UserError, match=rf"\(of '{family}', it (lacks|has) '\w+': \w+") as refused:
                method.check(arch)
            assert "see CONTRIBUTING" not in str(refused.value), "Family.lacks has no reason of its own"
            continue
        method.check(arch)
        if isinstance(method, WidthMethod):
            continue
        batches = contract_pruner.labelled(arch, 1, torch.float32)
        if isinstance(method, TokenMethod):
            planned = cut(model, method.plan(arch, method.score(model, batches), keep_rate=0.5))
            assert any(block.tokens for block in arch_of(planned).blocks), family
            model = planned
        elif isinstance(method, AppliedMethod):
            model = method.apply(model, method.configure({"r": 1} if "r" in method.option_names else {})).model
        elif isinstance(method, TrainedMethod):
            method.hook(method.for_budgets((0.7,), {}), arch).wrap(model)
        assert torch.isfinite(model(batches[0][0])).all(), family
