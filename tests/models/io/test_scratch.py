"""Scratch folders go with their block, and those of a killed process when the next one is made."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunesweep.models.io.files import publish_file, publish_folder, scratch_beside, sweep_below, write_text
from prunesweep.models.io.lock import Lock, reserve
from prunesweep.models.io.scratch import remove_scratch_folders, scratch_folder, scratch_for_libraries
from tests.killing import inside, killed_inside


def test_a_folder_goes_with_its_block(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as one, scratch_folder(tmp_path) as other:
        (one / "part").mkdir()
        (one / "part" / "file").write_text("x")
        assert one != other
        assert one.name.startswith("prunesweep-")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_a_live_one_has_stays(tmp_path: Path) -> None:
    own = tmp_path / "prunesweep-results"  # a folder of the user's, whose name looks like one of these
    own.mkdir()
    with inside(scratch_folder(tmp_path)):
        (first,) = set(tmp_path.iterdir()) - {own}
        with scratch_folder(tmp_path):
            assert first.exists()
    assert first.exists()
    with scratch_folder(tmp_path):
        assert not first.exists()
    assert list(tmp_path.iterdir()) == [own]


def test_a_process_that_ends_at_once_removes_its_folders(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        remove_scratch_folders()
        assert not folder.exists()


def test_what_libraries_of_a_killed_process_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's archive of what ``submit`` sends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    @contextlib.contextmanager
    def packing() -> Iterator[None]:
        with scratch_for_libraries(), tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "package.zip").write_text("x")
            yield

    killed_inside(packing())
    assert list(tmp_path.rglob("package.zip"))
    with packing():
        assert len(list(tmp_path.rglob("package.zip"))) == 1
    assert list(tmp_path.iterdir()) == []
    assert tempfile.gettempdir() == str(tmp_path)


def test_what_a_killed_process_left_beside_a_file_goes_when_it_is_made(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    for block in (publish_file(file), publish_folder(folder), scratch_beside(folder)):
        killed_inside(block)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with inside(publish_file(file)) as live:
        write_text(file, "whole")
        assert [path.name.split(".")[-2] for path in tmp_path.glob(".file.*")] == [str(live)]
    killed_inside(publish_folder(folder))
    sweep_below(tmp_path.parent)
    assert list(tmp_path.iterdir()) == [file]
    with publish_folder(folder):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_was_being_replaced_leaves_nothing(tmp_path: Path) -> None:
    dead = killed_inside(publish_folder(tmp_path / "folder"))
    (scratch,) = tmp_path.iterdir()
    assert f".{dead}." in scratch.name
    os.rename(scratch, scratch.with_suffix(".old"))
    with reserve(tmp_path / "folder"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_while_it_asks_for_a_lock_leaves_nothing(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".x.lock", "x")
    lock.place.mkdir()
    killed_inside(lock)
    dead = next(lock.place.glob("0*"))
    (lock.place / ".0123").write_bytes(dead.read_bytes())  # what asking makes
    with Lock(tmp_path / ".x.lock", "x"):
        pass
    assert list(tmp_path.iterdir()) == []
