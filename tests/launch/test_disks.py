"""Places that cannot be written to: found before any work where that can be, and said in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from prunesweep.models import save
from prunesweep.models.latency import building, timing
from tests.generate import random_model
from tests.launch.test_cli import call
from tests.search.execution import test_disk_full
from tests.search.execution.test_disk_full import filled
from tests.search.helpers import ARCH
from tests.search.report import test_token_picture

small_disk = test_disk_full.small_disk  # the fixture
CLUSTER = Path(__file__).parents[2] / "examples" / "imagenet_deit_small.toml"
REFUSES = Path("/sys/kernel/prunesweep")  # to root, too
ROOM = 2**15  # bytes: for what is begun, not for the model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(random_model(ARCH, 0, torch.float32), tmp_path / "model")


@pytest.mark.skipif(not REFUSES.parent.is_dir(), reason="there is no /sys")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["export", "MODEL", "--to", "timm", "--out"], "--out"),
        (["finetune", "MODEL", "--data", "digits", "--recipe", "quick", "--out"], "--out"),
        (["prune", "MODEL", "--data", "digits", "--method", "taylor", "--budget", "0.5", "--out"], "--out"),
        (["instant", "MODEL", "--data", "digits", "--out"], "--out"),
        (["bench", "MODEL", "--json"], "--json"),
        (["latency", "MODEL", "--out"], "--out"),
        (["latency", "MODEL", "--out", "TABLE", "--to-nvit"], "--to-nvit"),
        (["score", "MODEL", "--data", "digits", "--method", "taylor", "--cache"], "--cache"),
        (["prune", "MODEL", "--data", "digits", "--method", "2:4", "--out", "OUT", "--cache"], "--cache"),
        (["manifest", str(CLUSTER), "--to", "slurm", "--out"], "--out"),
    ],
    ids=" ".join,
)
def test_a_place_that_refuses_is_said_before_any_work(
    command: list[str],
    option: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, work in ((timing, "measure_all"), (building, "build_table")):
        monkeypatch.setattr(module, work, None)
    given = {"MODEL": model, "TABLE": tmp_path / "table.json", "OUT": tmp_path / "out"}
    code, out, error = call(capsys, *(given.get(part, part) for part in command), REFUSES)
    assert (code, out) == (2, "")
    assert f"error: {option} {REFUSES}: nothing can be written there: " in error
    assert len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_cache_that_is_a_file_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code, out, error = call(
        capsys, "score", model, "--data", "digits", "--method", "taylor", "--cache", tmp_path / "file"
    )
    assert (code, out, error) == (2, "", f"error: --cache {tmp_path}/file: is a file; give a folder\n")


def test_folders_of_files_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, image = tmp_path / "missing" / "folder", tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)
    planned = save(test_token_picture.model(), tmp_path / "planned")
    assert call(capsys, "show", planned, "--tokens", image, "--out", out / "tokens.png")[0] == 0
    assert call(capsys, "manifest", CLUSTER, "--to", "slurm", "--out", out / "more" / "job.sh")[0] == 0
    assert Image.open(out / "tokens.png").width > 100
    assert (out / "more" / "job.sh").read_text().startswith("#!")


def test_a_full_disk_is_said_and_leaves_nothing(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = save(random_model(ARCH, 0, torch.float32), small_disk / "model")
    with filled(small_disk):
        os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - ROOM)
        for to in ("timm", "torch-export"):
            code, _, error = call(capsys, "export", saved, "--to", to, "--out", small_disk / "exported")
            assert (code, "make room" in error) == (2, True), error
            assert len(error.splitlines()) == 1
    assert {path.name for path in small_disk.iterdir()} == {"model"}
