from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.models import UserError, arch_of, load, load_provenance, save
from prunesweep.training import EVAL_BATCH, evaluate, open_data
from tests.generate import random_model
from tests.models.test_in_other_code import KINDS

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
runner = CliRunner()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE)
    torch.nn.init.trunc_normal_(model.pos_embed, std=0.5)
    return save(model, tmp_path_factory.mktemp("source") / "model")


def command(source: Path, out: Path, *options: str) -> list[str]:
    given = ["--data", "digits", "--out", str(out), "--teacher", str(source), "--set", "batch_size=128"]
    return ["finetune", str(source), *given, "--set", "lr=2e-3", *options]


def test_in_one_process(source: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, command(source, tmp_path / "trained", "--epochs", "2", "--json"))
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    model = load(tmp_path / "trained")
    data = open_data("digits")
    assert facts["top1"] == evaluate(model, data.val_loader(EVAL_BATCH))["top1"]
    assert arch_of(model) == arch_of(load(source))
    provenance = load_provenance(tmp_path / "trained")
    assert provenance["recipe"]["epochs"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]
    logs = tmp_path / "trained" / "logs"
    epochs = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert epochs[-1]["top1"] == facts["top1"]
    assert list((logs / "tb").iterdir())


def test_without_the_source_that_a_recipe_distills_from_nothing_is_left(source: Path, tmp_path: Path) -> None:
    arguments = ["finetune", str(source), "--data", "digits", "--out", str(tmp_path / "trained"), "--epochs", "1"]
    result = runner.invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert "there is no source model to learn from: give one (--teacher)" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_channels_come_last_is_saved(source: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, command(source, tmp_path / "trained", "--epochs", "1", "--set", "channels_last=true"))
    assert result.exit_code == 0, result.output
    load(tmp_path / "trained")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "upvitt"), "unknown recipe 'upvitt'; known: gentle, gentle_pretrained, isomorphic"),
        (("--set", "epoch=3"), "epoch: unknown field"),
        (("--set", "batch_size=4000"), "but digits has 1347 training images"),
        (("--data", "imagefolder:/nowhere"), "no folder /nowhere/train"),
        (
            ("--set", 'distill=[{teacher="regnety_16O"}]'),
            "teacher = 'regnety_16O': neither 'source' nor a timm",
        ),
    ],
)
def test_errors_leave_no_model(source: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = runner.invoke(app, command(source, tmp_path / "trained", *options))
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)
    assert not (tmp_path / "trained").exists()


def test_classes_have_to_fit(source: Path, tmp_path: Path) -> None:
    other = save(timm.create_model("vit_tiny_patch16_224", num_classes=7, **SHAPE), tmp_path / "seven")
    result = runner.invoke(app, command(other, tmp_path / "trained"))
    assert "has 7 classes, digits has 10: give it a new head with timm.create_model" in str(result.exception)


@pytest.mark.slow
def test_two_workers_on_ray_survive_the_death_of_the_driver(source: Path, tmp_path: Path) -> None:
    """The same command goes on from the last checkpoint."""
    options = ("--epochs", "6", "--workers", "2", "--set", "batch_size=64")

    def start(out: Path) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "prunesweep", *command(source, out, *options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)

    driver = start(tmp_path / "killed")
    deadline = time.monotonic() + 200
    lines: list[str] = []
    while len(lines) < 2 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.2)
        found = list(tmp_path.glob(".killed-*/metrics.jsonl"))
        lines = found[0].read_text().splitlines() if found else []
    assert lines, driver.stdout and driver.stdout.read()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "killed").exists()
    run = start(tmp_path / "killed")
    output, _ = run.communicate(timeout=280)
    assert run.returncode == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]
    metrics = (tmp_path / "killed" / "logs" / "metrics.jsonl").read_text()
    epochs = [json.loads(line)["epoch"] for line in metrics.splitlines()]
    assert epochs[-1] == 6
    assert len(epochs) < 2 * 6  # it went on, it did not start again
    model = load(tmp_path / "killed")
    top1 = evaluate(model, open_data("digits").val_loader(EVAL_BATCH))["top1"]
    assert top1 == load_provenance(tmp_path / "killed")["top1"]


def coloured(folder: Path, name: str = "vit_tiny_patch16_224", **shape: object) -> Path:
    torch.manual_seed(0)
    return save(timm.create_model(name, num_classes=2, **shape), folder / "source")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_tiny_patch16_224", {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 1, "num_heads": 2}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4},
        ),
    ],
)
def test_a_model_is_trained_at_another_size(
    tmp_path: Path, image_folder: Path, name: str, shape: dict[str, object]
) -> None:
    source, out = coloured(tmp_path, name, **shape), tmp_path / "trained"
    given = ["--data", f"imagefolder:{image_folder}", "--teacher", str(source), "--set", "distill=[{}]"]
    training = [*given, "--epochs", "1", "--set", "batch_size=4", "--img-size", "24"]
    result = runner.invoke(app, ["finetune", str(source), "--out", str(out), *training])
    assert result.exit_code == 0, result.output
    side = shape["img_size"]
    assert f"images of 24 x 24 instead of {side} x {side}: " in result.output
    trained = load(out)
    assert arch_of(trained).img_size == (24, 24)
    assert trained(torch.zeros(1, 3, 24, 24)).shape == (1, 2)
    assert load_provenance(out)["img_size"] == [24, 24]
    assert trained.pretrained_cfg["input_size"] == (3, 24, 24)  # type: ignore[index]


def test_a_token_plan_is_for_one_size(tmp_path: Path, image_folder: Path) -> None:
    source = save(random_model(KINDS["sparse"], 0, torch.float32), tmp_path / "source")
    options = ["--data", f"imagefolder:{image_folder}", "--out", str(tmp_path / "out"), "--img-size", "24"]
    result = runner.invoke(app, ["finetune", str(source), *options])
    assert isinstance(result.exception, UserError)
    assert "token" in str(result.exception)
    result = runner.invoke(app, ["finetune", str(source), *options, "--second-stage", "pmvit"])
    assert "--img-size: --second-stage pmvit trains what was cut, at its own size" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("source", "images")] == []
