from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from prunesweep.models import arch_of, save
from tests.generate import random_images, random_model
from tests.launch.test_cli import call
from tests.search.helpers import ARCH


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(random_model(ARCH, 0, torch.float32), tmp_path / "model")


def test_export_says_what_was_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "export", model, "--to", "timm", "--json")
    assert code == 0
    found = json.loads(out)
    path = tmp_path / "model-timm"
    assert found.pop("max_error") < 1e-5
    assert found == {"path": str(path), "to": "timm", "bytes": sum(p.stat().st_size for p in path.iterdir())}
    assert arch_of(timm.create_model(f"local-dir:{path}", pretrained=True)) == ARCH


def test_export_to_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "small.pt2"
    code, out, err = call(capsys, "export", model, "--to", "torch-export", "--out", path)
    assert code == 0
    assert out.startswith(f"{path}: {path.stat().st_size:,} bytes; its logits differ from the model's by at most ")
    assert torch.export.load(path).module()(random_images(ARCH, 0, batch=4, dtype=torch.float32)).shape == (4, 10)
    assert "Warning" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{model}", "--to", "tflite"], "to = 'tflite': must be one of torch-export, onnx, timm"),
        (["export", "{model}", "--to", "onnx", "--opset", "9"], "opset = 9: must lie in 18..23"),
        (["export", "{model}", "--to", "timm", "--out", "{model}"], "is there already"),
        (["export", "{model}", "--to", "timm", "--fused"], "fused: is for torch-export, onnx and standalone"),
        (["export", "nowhere", "--to", "timm"], "neither the folder of a saved model nor a timm model"),
        (["push", "{model}", "small"], "repo_id = 'small': must be OWNER/NAME"),
    ],
)
def test_user_errors(
    arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *(a.replace("{model}", str(model)) for a in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
