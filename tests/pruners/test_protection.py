"""What is protected stays, whatever decides; and what contradicts it is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.models import Arch, UserError, arch_of, cut_arch, load, load_provenance, save
from prunesweep.pruners import GROUP_SIZES, Scores, width_path
from prunesweep.pruners.protection import Protection
from prunesweep.pruners.scores import unit_counts
from prunesweep.search.space.space import Space
from tests.conftest import tiny_config

SHAPE: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}
GROUPS = {**dict.fromkeys(GROUP_SIZES, 1), "mlp": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE)
    return save(model, tmp_path_factory.mktemp("source") / "model")


def even(arch: Arch) -> Scores:
    kinds = ("embed", "heads", "qk", "v", "mlp")
    counts = {name: n for name, n in unit_counts(arch).items() if name.rpartition(".")[2] in kinds}
    return Scores({name: torch.ones(n, dtype=torch.float64) for name, n in counts.items()})


@pytest.mark.parametrize("given", [["blocks=0,2"], ["mlp=1", "heads"], ["embed", "qk=0"]])
def test_the_narrowest_model_of_a_path_has_what_is_protected(source: Path, given: list[str]) -> None:
    arch, protected = arch_of(load(source)), Protection.parse(given)
    free = width_path(arch, even(arch), groups=GROUPS)
    path = width_path(arch, even(arch), groups=GROUPS, protected=protected)
    assert protected.broken(arch, cut_arch(arch, path.cut(len(path.steps)))) is None
    assert protected.broken(arch, cut_arch(arch, free.cut(len(free.steps)))) is not None


def test_what_contradicts_is_refused(source: Path) -> None:
    arch = arch_of(load(source))
    for texts, message in (
        (["block=0"], "'block' is none of blocks, embed, heads"),
        (["blocks"], "must be like blocks=0,11"),
        (["blocks=x"], "must be like blocks=0,11"),
        (["embed=0"], "no block has embed for itself"),
        (["blocks=3"], "there is no block 3; .* has blocks 0..2"),
    ):
        with pytest.raises(UserError, match=message):
            Protection.parse(texts).check(arch)
    for decided, message in (
        ({"dropped": [0]}, "block 0 is dropped"),
        ({"mixers": {0: "conv1x1"}}, "block 0 gets another mixer"),
        ({"without_mlp": [0]}, "block 0 loses its MLP"),
    ):
        with pytest.raises(UserError, match=message):
            width_path(arch, even(arch), groups=GROUPS, protected=Protection.parse(["blocks=0"]), **decided)  # type: ignore[arg-type]


def test_projection_keeps_the_heads_whose_values_are_protected() -> None:
    assert Protection.parse(["v=1", "qk=0"]).with_heads().spaces["heads"] == {0, 1}
    assert Protection.parse(["v"]).with_heads().keeps("blocks.7.heads")
    assert not Protection.parse(["mlp"]).with_heads().keeps("blocks.0.heads")


@pytest.mark.parametrize("command", ["prune", "instant"])
def test_commands_protect(source: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    options = {
        "prune": ["--method", "magnitude", "--budget", "0.8", "--group", "mlp=4", "--group", "heads=1", "--no-recover"],
        "instant": ["--budgets", "0.6"],
    }[command]
    given = ["--data", "digits", "--images", "32", "--out", str(out), *options]
    refused = CliRunner().invoke(app, [command, str(source), *given, "--protect", "blocks=7"])
    assert "--protect: there is no block 7" in str(refused.exception)
    done = CliRunner().invoke(app, [command, str(source), *given, "--protect", "blocks=1"])
    assert done.exit_code == 0, done.output
    model = out if command == "prune" else out / "0.6"
    assert Protection.parse(["blocks=1"]).broken(arch_of(load(source)), arch_of(load(model))) is None
    assert load_provenance(model)["protect"] == ["blocks=1"]


def test_no_candidate_of_a_space_touches_what_is_protected(source: Path) -> None:
    arch = arch_of(load(source))

    def space(**table: Any) -> Space:
        config = tiny_config(space={"protect": ["blocks=1", "mlp"], "skip": [0, 1], "conv": [0, 1], **table})
        return Space.check(config.space, arch, "magnitude")

    own = space(budget=[0.5, 0.9])
    for point in own.summarise(24, 0).points:
        assert own.protected.broken(arch, own.decode(point).arch) is None
    with pytest.raises(UserError, match="only 1 of 3 blocks may be dropped, as space.protect"):
        space(skip=[0, 2])
    with pytest.raises(UserError, match="has blocks 0..2"):
        space(protect=["blocks=9"])
    with pytest.raises(UserError, match="space: .*'head' is none of"):
        tiny_config(space={"protect": ["head"]})
