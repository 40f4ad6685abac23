"""``prunesweep verify`` of saved models and computed fronts; of runs, see ``tests/search/test_damage.py``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prunesweep.models import cost, save
from tests.generate import random_model
from tests.launch.test_cli import call
from tests.search.helpers import ARCH


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(random_model(ARCH, 0, torch.float32), tmp_path / "model")


@pytest.fixture
def front(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "front"
    shutil.copytree(model, folder / "0.5")
    spent = cost(ARCH)
    row = {"budget": 0.5, "macs": spent.macs, "params": spent.params, "macs_share": 1.0, "images": 8}
    points = [{**row, "model": None}, {**row, "model": "0.5"}]
    (folder / "front.json").write_text(json.dumps({"source": "test", "points": points}))
    return folder


def test_what_is_sound(model: Path, front: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (model, front):
        assert call(capsys, "verify", path) == (0, f"{path}: all is sound\n", "")
        assert json.loads(call(capsys, "verify", path, "--json")[1]) == {"path": str(path), "problems": []}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_named_with_the_remedy(
    name: str, model: Path, front: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, file, remedy in (
        (model, model / name, "save the model again"),
        (front, front / "0.5" / name, "compute the front again"),
    ):
        file.write_bytes(file.read_bytes()[:-9] + b"\0" * 9)
        code, out, _ = call(capsys, "verify", path)
        assert (code, len(out.splitlines())) == (1, 1)
        assert str(file) in out
        assert remedy in out
        code, out, _ = call(capsys, "verify", path, "--json")
        (problem,) = json.loads(out)["problems"]
        assert (code, str(file) in problem["found"], remedy in problem["remedy"]) == (1, True, True)


def test_another_model_in_a_front_is_seen(front: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((front / "front.json").read_text())
    facts["points"][1]["macs"] += 1
    (front / "front.json").write_text(json.dumps(facts))
    code, out, _ = call(capsys, "verify", front)
    assert (code, "0.5 holds another model than the one that front.json is about" in out) == (1, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_sound(
    value: float, front: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = random_model(ARCH, 0, torch.float32)
    with torch.no_grad():
        broken.get_parameter("blocks.1.mlp.fc1.bias")[0] = value
    save(broken, front / "0.5")
    for path in (front, front / "0.5"):
        code, out, _ = call(capsys, "verify", path)
        assert (code, "0.5: blocks.1.mlp.fc1.bias has 1 values that are NaN or infinite" in out) == (1, True)


def test_what_can_be_verified_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = call(capsys, "verify", tmp_path)
    assert (code, f"{tmp_path} is no run, no saved model and no front" in error) == (2, True)
