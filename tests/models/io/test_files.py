"""What is published is on the disk before it has its name, and has the rights of new files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunesweep.models import save
from prunesweep.models.io.export import export
from prunesweep.models.io.files import make_folder, publish_file, publish_folder, write_text
from prunesweep.training.checkpoint import save_state
from tests.generate import random_model
from tests.publishing import watched
from tests.search.helpers import ARCH


@pytest.fixture(params=[0o002, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path: Path) -> None:
    model = random_model(ARCH, 0, torch.float32)
    with watched() as watch:
        write_text(tmp_path / "a.json", "{}")
        save(model, tmp_path / "new" / "model")
        save(model, tmp_path / "new" / "model")  # replaced
        save_state(tmp_path / "state.safetensors", {"weights": torch.ones(3)})
        export(model, tmp_path / "exported", "timm")
    names = ("a.json", "new/model", "state.safetensors", "exported")
    assert watch.published >= {tmp_path / name for name in names}


def test_the_watch_sees_what_is_not_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / ".a").write_text("x")
    with pytest.raises(AssertionError, match="renamed before it was synced"), watched():
        os.replace(tmp_path / ".a", tmp_path / "a")

    def unsettled() -> None:
        with watched():
            descriptor = os.open(tmp_path / ".a", os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(tmp_path / ".a", tmp_path / "a")

    with pytest.raises(AssertionError, match="a rename was not synced"):
        unsettled()


def test_a_new_folder_is_listed_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (real(d), synced.append(os.fstat(d).st_ino)))
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino]


def test_storage_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lost"):
        make_folder(tmp_path / "lost" / "trials" / "r0-0000", within=tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_rights_follow_the_umask_whatever_wrote_the_files(umask: int, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    with publish_file(tmp_path / "file") as scratch:
        save_file(tensors, scratch)
        scratch.chmod(0o600)  # as safetensors and tempfile make files, whatever the umask
    with publish_folder(tmp_path / "folder") as folder:
        (folder / "below").mkdir(mode=0o700)
        save_file(tensors, folder / "below" / "weights")
        (folder / "below" / "weights").chmod(0o600)
        (folder / "open").write_text("x")
        (folder / "open").chmod(0o666)
    save(random_model(ARCH, 0, torch.float32), tmp_path / "model")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()}
    assert folders == {0o777 & ~umask}
