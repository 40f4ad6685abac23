from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

from launch.cli import app
from models import UserError, arch_of, cost, load, load_provenance, save

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 3, "num_heads": 4}
runner = CliRunner()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(timm.create_model("vit_tiny_patch16_224", **SHAPE), tmp_path_factory.mktemp("source") / "model")


def prune(source: Path, out: Path, *options: str, method: str = "nvit", budget: str = "0.6"):
    return runner.invoke(
        app,
        [
            *("prune", str(source), "--method", method, "--budget", budget, "--data", "digits"),
            *("--out", str(out / "small"), "--cache", str(out / "scores"), "--images", "64"),
            *("--group", "heads=1", "--group", "mlp=8", "--group", "embed=8", "--group", "dim=4"),
            *options,
        ],
    )


def test_one_method_once(source: Path, tmp_path: Path) -> None:
    result = prune(source, tmp_path, "--json", "--drop", "1", "--floor", "mlp=0.25")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    small = load(tmp_path / "small")
    assert facts["macs"] == cost(arch_of(small)).macs <= 0.6 * cost(arch_of(load(source))).macs
    assert arch_of(small).depth == 2
    assert min(block.mlp for block in arch_of(small).blocks) >= 32
    provenance = load_provenance(tmp_path / "small")
    assert provenance["method"] == "nvit"
    assert (tmp_path / "scores" / provenance["scores"]).exists()
    assert len(list((tmp_path / "scores").iterdir())) == 2  # of widths and of blocks


def test_another_budget_costs_no_scoring(source: Path, tmp_path: Path) -> None:
    arguments = ["score", str(source), "--method", "taylor", "--data", "digits", "--images", "64"]
    scored = runner.invoke(app, [*arguments, "--cache", str(tmp_path / "scores")])
    assert scored.exit_code == 0, scored.output
    (cached,) = (tmp_path / "scores").iterdir()
    assert cached.name in scored.stdout.replace("\n", "")
    before = cached.stat().st_mtime_ns
    result = prune(source, tmp_path, "--measure", "params", method="taylor", budget="20K")
    assert result.exit_code == 0, result.output
    assert cost(arch_of(load(tmp_path / "small"))).params <= 20_000
    assert [path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()] == [before]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nvti"}, "--method nvti: must be one of nvit, upvit,"),
        ({"budget": "half"}, "--budget half: must be a number such as 0.5, 300M or 1.2G"),
        ({"budget": "-1"}, "budget = -1.0: give a share"),
        ({"budget": "0.0001"}, "macs cannot be reached"),
        ({"extra": ("--measure", "flops")}, "--measure flops: must be one of macs, params, latency_ms"),
        ({"extra": ("--group", "mpl=3")}, "--group mpl=3: unknown kind 'mpl'; known: embed"),
        ({"extra": ("--group", "mlp")}, "--group mlp: must be KIND=VALUE"),
        ({"extra": ("--drop", "3")}, "drop = 3: the model has 3 blocks"),
        ({"method": "isomorphic"}, "method 'isomorphic' decides by ratios per structure: it takes no drop, groups"),
    ],
)
def test_errors_leave_nothing_behind(source: Path, tmp_path: Path, options: dict, message: str) -> None:
    result = prune(source, tmp_path, *options.pop("extra", ()), **options)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not (tmp_path / "small").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    result = prune(Path("deit_tinny_patch16_224"), tmp_path)
    assert "neither the folder of a saved model nor a timm model. did you mean 'deit_tiny_patch16_224'?" in str(
        result.exception
    )
    (tmp_path / "small").mkdir()
    assert "is there already; give a new folder" in str(prune(tmp_path, tmp_path).exception)
