"""Commands that take a model and data: what does not fit is refused before any work, and the data are said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from prunesweep.models import arch_of, save
from prunesweep.search.config import SearchConfig, parse_config
from tests.launch.test_cli import call

COMMANDS: dict[str, list[str]] = {
    "eval": ["eval", "{model}"],
    "score": ["score", "{model}", "--method", "magnitude"],
    "prune widths": ["prune", "{model}", "--method", "magnitude", "--budget", "0.8", "--out", "out"],
    "prune tokens": ["prune", "{model}", "--method", "pmvit", "--keep-rate", "0.5", "--out", "out"],
    "prune while training": ["prune", "{model}", "--method", "uvc", "--budget", "0.5", "--out", "out"],
    "prune at once": ["prune", "{model}", "--method", "tome", "--r", "2"],
    "instant": ["instant", "{model}", "--out", "out"],
    "finetune": ["finetune", "{model}", "--out", "out", "--epochs", "0", "--teacher", "{model}"],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of images of 1 x 8 x 8 and ten classes, as digits are."""
    return saved(tmp_path / "model", in_chans=1)


def saved(folder: Path, **shape: Any) -> Path:
    torch.manual_seed(0)
    own = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 10}
    made = timm.create_model("vit_tiny_patch16_224", **{**own, **shape})
    made.pretrained_cfg["input_size"] = (shape["in_chans"], *arch_of(made).img_size)
    return save(made, folder)


def arguments(command: str, model: Path, data: str) -> list[str]:
    return [part.replace("{model}", str(model)) for part in COMMANDS[command]] + ["--data", data]


@pytest.mark.parametrize("command", COMMANDS)
def test_data_of_other_classes_are_refused(
    command: str,
    model: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    code, _, err = call(capsys, *arguments(command, model, f"imagefolder:{image_folder}"))
    assert code == 2
    assert f"has 10 classes, imagefolder:{image_folder} has 2" in err
    assert not list(here.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_data_of_other_images_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    coloured = saved(tmp_path / "coloured", in_chans=3)
    code, _, err = call(capsys, *arguments(command, coloured, "digits"))
    assert code == 2
    assert "takes images of (3, 8, 8), digits has (1, 8, 8)" in err
    assert not list(here.iterdir())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("prune while training", "instant")])
def test_the_data_are_described_once(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    code, out, err = call(capsys, *arguments(command, model, "digits"))
    assert code == 0, err
    assert (out + err).count("digits: 1,347 train, 450 val, 10 classes\npreprocessing: mean 0.3053, std 0.376\n") == 1


def test_a_dry_run_refuses_what_does_not_fit_and_says_what_is_not_here(
    model: Path,
    image_folder: Path,
    tiny: Callable[..., SearchConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toml = tmp_path / "search.toml"
    settings = tiny().model_dump(mode="json", exclude_none=True)
    source = {"model": f"local-dir:{model}"}
    for data, code, text in (
        (f"imagefolder:{image_folder}", 2, f"source.model has 10 classes, imagefolder:{image_folder} has 2"),
        ("imagefolder:/gone", 0, "not here: data 'imagefolder:/gone': no folder /gone/train"),
    ):
        toml.write_text(parse_config({**settings, "data": {"name": data}, "source": source}, "x").to_toml())
        found, out, err = call(capsys, "search", toml, "--dry-run", "--out", tmp_path / "run")
        assert (found, text in out + err) == (code, True), out + err
    found, out, err = call(capsys, "doctor", toml)
    assert "data here" in out
    assert found == 0
    toml.write_text(parse_config({**settings, "data": {"name": "digits"}, "source": source}, "x").to_toml())
    assert "digits: 1,347 train, 450 val, 10 classes" in call(capsys, "doctor", toml)[1]
