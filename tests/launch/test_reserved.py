"""A place where another command is making something is refused by every command that makes something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prunesweep.models import UserError
from prunesweep.models.io.lock import reserve
from prunesweep.search import run_search
from prunesweep.search.config import SearchConfig
from tests.launch.digits_model import digits_model
from tests.launch.test_cli import call


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = digits_model(tmp_path_factory.mktemp("reserved") / "source")
    torch.save({}, path.with_name("checkpoint.pth"))
    return path


COMMANDS = {
    "prune": ("prune", "SOURCE", "--method", "magnitude", "--budget", "0.5", "--data", "digits"),
    "finetune": ("finetune", "SOURCE", "--data", "digits", "--recipe", "quick", "--teacher", "SOURCE"),
    "import": ("import", "SOURCE/../checkpoint.pth", "--as", "upvit"),
    "export": ("export", "SOURCE", "--to", "timm"),
    "instant": ("instant", "SOURCE", "--data", "digits", "--images", "64"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reserved_place_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    given = [part.replace("SOURCE", str(source)) for part in COMMANDS[command]]
    with reserve(tmp_path / "out"):
        code, _, error = call(capsys, *given, "--out", tmp_path / "out")
    assert code == 2, error
    assert "out is in use by process" in error
    assert list(tmp_path.iterdir()) == []


def test_a_search_whose_folder_another_one_is_making_is_refused(
    tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    with reserve(tmp_path / "run"), pytest.raises(UserError, match="run is in use by process"):
        run_search(tiny(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
