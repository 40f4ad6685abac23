"""A full disk ends a search cleanly: nothing that is finished is lost, and it goes on once there is room."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError
from prunesweep.models.io.files import disk_full, write_text
from prunesweep.search import resume_search, run_search
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution import driver
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.task import run_task
from tests.search.execution.test_task import begin
from tests.search.in_process import without_ray

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """No room is left meanwhile."""
    file = disk / "filler"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            if out.write(bytes(MIB)) < MIB:
                break
    yield
    file.unlink()


def test_nothing_half_written_is_left(small_disk: Path) -> None:
    write_text(small_disk / "file", "as it was")
    with filled(small_disk):
        with pytest.raises(OSError, match="No space left") as found:
            write_text(small_disk / "file", "x" * MIB)
        assert disk_full(found.value)
        assert (small_disk / "file").read_text() == "as it was"
        assert {path.name for path in small_disk.iterdir()} == {"file", "filler"}
    assert not disk_full(FileNotFoundError("No such file"))


def test_a_unit_goes_on_once_there_is_room(tiny: Callable[..., SearchConfig], runs: Path, small_disk: Path) -> None:
    run, coordinator = begin(tiny(finetune={"epochs": 2}), runs / "cache", small_disk / "run")
    unit = coordinator.next()
    assert unit is not None
    with filled(small_disk):
        assert run_task(run.path, unit) == {"state": "disk full"}
        assert run.read_result(unit.id) is None
        assert not list(run.trial(unit.id).glob(".*"))
    assert run_task(run.path, unit)["state"] == "finished"


@pytest.mark.slow
def test_a_search_ends_and_goes_on(tiny: Callable[..., SearchConfig], runs: Path, small_disk: Path) -> None:
    config = tiny(resources={"cpus": 1}, finetune={"epochs": 2})
    begin(config, runs / "cache", small_disk / "prepared")  # the source is in the cache
    (small_disk / "cache").symlink_to(runs / "cache")
    first, room = small_disk / "run" / "trials" / "r0-0000" / "result.json", threading.Event()

    def fill() -> None:
        while not first.exists():
            time.sleep(0.05)
        with filled(small_disk):
            room.wait()

    thread = threading.Thread(target=fill)
    thread.start()
    with pytest.raises(UserError, match=r"no space is left on its disk. .* prunesweep resume"):
        run_search(config, small_disk / "run")
    done = {path: path.stat().st_mtime for path in small_disk.glob("run/trials/*/result.json")}
    assert first in done
    room.set()
    thread.join()
    result = resume_search(small_disk / "run")
    assert result.finished
    assert {path.stat().st_mtime for path in done} == set(done.values())
    assert len(list(small_disk.glob("run/trials/*/result.json"))) == config.search.trials


def test_storage_that_is_gone_is_not_made_anew(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a run that is lost in mid-run would else come to be where its storage was mounted."""
    (tmp_path / "cache").symlink_to(runs / "cache")

    def lost(coordinator: Coordinator, *_: Any, **__: Any) -> None:
        shutil.rmtree(coordinator.run.path)
        coordinator.next()

    without_ray(monkeypatch)
    monkeypatch.setattr(driver, "execute", lost)
    with pytest.raises(UserError, match=r"is gone, and its storage with it: bring that back, then prunesweep resume"):
        run_search(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
