"""What a stranger gives - a model, a checkpoint, a configuration, a folder to stand in - runs no code of theirs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from prunesweep.launch.cli import main
from prunesweep.models import UserError, load, save
from prunesweep.models.importers import LAYOUTS, import_checkpoint
from prunesweep.pruners import Scores
from prunesweep.search import run_search
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.training.checkpoint import load_state
from tests.generate import random_model
from tests.search.helpers import ARCH


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(random_model(ARCH, 0, torch.float32), tmp_path / "model")


def pickles(path: Path, mark: Path) -> list[Path]:
    """A payload as torch.save writes it, in both of its formats, and as a bare pickle."""
    found = [path.with_name(f"{number}-{path.name}") for number in range(3)]
    torch.save({"model": Payload(mark)}, found[0])
    torch.save({"model": Payload(mark)}, found[1], _use_new_zipfile_serialization=False)
    found[2].write_bytes(pickle.dumps(Payload(mark)))
    return found


def test_the_payload_is_one(tmp_path: Path, mark: Path) -> None:
    for path in pickles(tmp_path / "x.pth", mark)[:2]:
        torch.load(path, weights_only=False)
        mark.rmdir()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_importing_a_checkpoint(tmp_path: Path, mark: Path, layout: str) -> None:
    for path in pickles(tmp_path / "x.pth", mark):
        with pytest.raises(UserError):
            import_checkpoint(path, layout)
    assert not mark.exists()


def test_a_checkpoint_of_timm_in_a_configuration(tiny: Callable[..., SearchConfig], tmp_path: Path, mark: Path) -> None:
    for path in pickles(tmp_path / "x.pth", mark):
        args = {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "checkpoint_path": str(path)}
        config = tiny(source={"model": "vit_tiny_patch16_224", "args": args})
        with pytest.raises(UserError, match="cannot be made: "):
            run_search(config, tmp_path / "run", dry_run=True)
    assert not mark.exists()


def test_files_of_a_model_that_are_pickles(model: Path, mark: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        for path in pickles(model / name, mark):
            os.replace(path, model / name)
            with contextlib.suppress(UserError):
                load(model)
    assert not mark.exists()


def test_state_and_scores_that_are_pickles(tmp_path: Path, mark: Path) -> None:
    for path in pickles(tmp_path / "x.safetensors", mark):
        assert load_state(path) is None
        with pytest.raises(UserError, match="is damaged"):
            Scores.load(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "os.system"},
        {"architecture": "../../x"},
        {"model_args": {"arch": "__import__('os').mkdir('executed')"}},
        {"model_args": {"arch": {"__class__": "os.system"}}},
        {"pretrained_cfg": {"custom_load": True}},
        {"pretrained_cfg": "os.system"},
    ],
)
def test_a_models_configuration_names_no_code(
    model: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with contextlib.suppress(UserError):
        load(model)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_a_header_that_claims_to_be_huge_is_refused(model: Path, length: int) -> None:
    weights, config = model / "model.safetensors", model / "config.json"
    weights.write_bytes(length.to_bytes(8, "little") + b"{}")
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "weights_sha256"}))
    with pytest.raises(UserError, match="model.safetensors"):
        load(model)


@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, 'a = {b = "' + "x" * 10, "\x00", "a = 1\na = 2"])
def test_a_configuration_that_is_no_toml_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError, match=r"x\.toml"):
        load_config(tmp_path / "x.toml")


def test_nested_json_in_a_model_is_one_message(model: Path) -> None:
    (model / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json"):
        load(model)


def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path, model: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("torch", "timm", "sitecustomize", "usercustomize", "prunesweep", "json", "rich"):
        (here / f"{name}.py").write_text("import os; os.mkdir('executed')\n")
    command = Path(sys.executable).with_name("prunesweep")
    if not command.exists():
        pytest.skip("the command is not installed")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    found = subprocess.run(
        [command, "show", str(model)], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert not (here / "executed").exists()


def test_a_name_of_a_model_is_no_path_to_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("import os; os.mkdir('executed')\n")
    for name in ("evil", "evil:model", "./evil.py", "local-dir:evil.py", "module:evil"):
        with pytest.raises(SystemExit):
            main(["show", name])
        with pytest.raises(SystemExit):
            main(["eval", name, "--data", "digits"])
    assert not (tmp_path / "executed").exists()
    assert "evil" not in timm.list_models()
