from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError
from prunesweep.models.io import lock
from prunesweep.models.io.lock import RELEASED, STALE, Lock, Lost, Vanished, reserve

FORK = multiprocessing.get_context("fork")
ENTER = (
    "import os, sys, time; from pathlib import Path; from prunesweep.models.io.lock import Lock\n"
    "Lock(Path(sys.argv[1]), 'it', keep=True).__enter__(); print('in', flush=True); time.sleep(float(sys.argv[2]))"
)


def lease_of(place: Path) -> Path:
    """The highest lease."""
    return max(path for path in place.iterdir() if path.name.isdigit())


def set_lease(place: Path, number: int = 1, age: float = 0.0, **given: Any) -> Path:
    """Write the lease of a process on another host."""
    place.mkdir(exist_ok=True)
    path = place / f"{number:09d}"
    facts = {"identity": "x", "host": "elsewhere", "pid": 1, "started": ""}
    path.write_text(json.dumps({**facts, **given}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    place = tmp_path / "leases"
    with Lock(place, "it") as held:
        held.check()
        found = Lock.holder(place)
        assert found is not None
        assert found.pid == os.getpid()
        with pytest.raises(UserError, match=f"it is in use by process {os.getpid()} on "), Lock(place, "it"):
            pass
        held.check()
    assert Lock.holder(place) is None
    assert list(tmp_path.iterdir()) == []
    with Lock(place, "it"):
        pass


def test_numbers_rise_where_the_folder_is_kept(tmp_path: Path) -> None:
    numbers = []
    for _ in range(3):
        with Lock(tmp_path, "it", keep=True) as held:
            numbers.append(held.number)
        assert [path.name for path in tmp_path.iterdir()] == [f"{held.number:09d}"]
    assert numbers == [1, 2, 3]


def race(place: Path, rounds: int, barrier: Any, keep: bool, dead: bool) -> None:
    """In every round try to take the lock with others; note who has it, and check that nobody else does."""
    for number in range(rounds):
        if dead and barrier.wait(60) == 0:
            free = max((int(path.name) for path in place.glob("0*")), default=0) + 1 if place.exists() else 1
            set_lease(place, free, age=2 * STALE)
        barrier.wait(60)
        with contextlib.suppress(UserError), Lock(place, "it", keep=keep) as held:
            inside = place.parent / "inside"
            inside.mkdir()  # fails where another process is in
            (place.parent / f"round-{number}" / str(os.getpid())).touch()
            held.check()
            inside.rmdir()


def run_races(folder: Path, processes: int, rounds: int, *, keep: bool, dead: bool) -> list[int]:
    """How many processes had the lock in each round, one after the other."""
    barrier = FORK.Barrier(processes)
    for number in range(rounds):
        (folder / f"round-{number}").mkdir()
    started = [
        FORK.Process(target=race, args=(folder / "leases", rounds, barrier, keep, dead)) for _ in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    assert not (folder / "inside").exists()
    return [len(list((folder / f"round-{number}").iterdir())) for number in range(rounds)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dead", [True, False])
def test_processes_that_race_are_never_in_together(tmp_path: Path, keep: bool, dead: bool) -> None:
    assert min(run_races(tmp_path, 3, 40, keep=keep, dead=dead)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_many_races(tmp_path: Path, processes: int) -> None:
    for number, (keep, dead) in enumerate([(True, True), (True, False), (False, True), (False, False)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert min(run_races(folder, processes, 84, keep=keep, dead=dead)) >= 1


def test_a_number_that_was_used_again_meanwhile_is_not_taken_for_the_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look and a link others can take over from a dead holder, leave, and begin again at its number."""
    place, link, others = tmp_path / "leases", lock._link, []
    set_lease(place, age=2 * STALE)

    def late(scratch: Path, lease: Path) -> None:
        if not others:
            others.append(Lock(place, "it"))
            lease_of(place).unlink()
            others[0].__enter__()
        link(scratch, lease)

    monkeypatch.setattr(lock, "_link", late)
    with pytest.raises(UserError, match="it is in use by process"), Lock(place, "it"):
        pass
    assert [one.number for one in others] == [1]
    others[0].check()
    assert [path.name for path in place.iterdir()] == ["000000001"]
    others[0].release()


def test_a_lease_that_came_too_late_and_goes_again_ends_nobody(tmp_path: Path) -> None:
    with Lock(tmp_path, "it", keep=True) as held:
        late = set_lease(tmp_path, 2)
        threading.Timer(0.1, late.unlink).start()
        held.check()


def test_a_killed_holder_on_this_machine_is_known_at_once(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ENTER.replace("time.sleep", "os._exit(9); "), tmp_path, "0"], check=False)
    assert lease_of(tmp_path).stat().st_mtime > RELEASED
    assert Lock.holder(tmp_path) is None
    with Lock(tmp_path, "it", keep=True) as held:
        assert held.number == 2


def test_a_reused_process_number_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    with Lock(tmp_path, "it", keep=True):
        own = json.loads(lease_of(tmp_path).read_text())
    set_lease(tmp_path, **{**own, "started": "1"})
    assert Lock.holder(tmp_path) is None


def test_a_holder_in_another_container_is_alive_as_long_as_it_touches_its_lease(tmp_path: Path) -> None:
    with Lock(tmp_path, "it", keep=True):
        own = json.loads(lease_of(tmp_path).read_text())
    gone = {**own, "pid": 2**22 + 1}
    set_lease(tmp_path, **gone)
    assert Lock.holder(tmp_path) is None  # this kernel's, and seen from here
    for other in ({"processes": "pid:[1]"}, {"boot": "another"}):
        set_lease(tmp_path, **{**gone, **other})
        assert Lock.holder(tmp_path) is not None
        set_lease(tmp_path, age=STALE + 1, **{**gone, **other})
        assert Lock.holder(tmp_path) is None


def test_a_holder_in_another_pid_namespace_is_seen(tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine lets nobody make a PID namespace")
    inner = subprocess.Popen([*unshare, sys.executable, "-c", ENTER, tmp_path, "60"], stdout=subprocess.PIPE)
    try:
        assert inner.stdout is not None
        assert inner.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="in use"), Lock(tmp_path, "it", keep=True):
            pass
    finally:
        inner.kill()
        inner.wait()


def test_the_readers_clock_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_lease(tmp_path)
    now = time.time()
    for apart in (-3600.0, 3600.0):
        monkeypatch.setattr(time, "time", lambda apart=apart: now + apart)
        assert Lock.holder(tmp_path) is not None
        with pytest.raises(UserError, match="in use by process 1 on elsewhere"), Lock(tmp_path, "it", keep=True):
            pass


def test_a_holder_that_slept_too_long_finds_another_one_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    lost: list[Lost] = []
    with Lock(tmp_path, "it", keep=True, on_lost=lost.append) as sleeper:
        fence = sleeper.fence
        set_lease(tmp_path, sleeper.number, age=STALE + 1)  # as if it had been stopped for so long
        with Lock(tmp_path, "it", keep=True) as other:
            for check in (sleeper.check, fence.check):
                with pytest.raises(Lost, match="another process has taken over"):
                    check()
            deadline = time.monotonic() + 10
            while not lost and time.monotonic() < deadline:
                time.sleep(0.02)
            assert len(lost) == 1
            sleeper.release()
            other.check()  # what it has is left to it


@pytest.mark.slow
def test_a_stopped_process_is_replaced_and_ends_when_it_goes_on(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from prunesweep.models.io import lock\n"
        "import time; lock.BEAT = 0.1\n"
        "lock.Lock(Path(sys.argv[1]), 'it', keep=True, on_lost=lambda _: os._exit(4)).__enter__()\n"
        "print('in', flush=True); time.sleep(60)"
    )
    sleeper = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert sleeper.stdout is not None
    assert sleeper.stdout.readline() == b"in\n"
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    lease = lease_of(tmp_path)
    own = json.loads(lease.read_text())
    lease.write_text(json.dumps({**own, "boot": "of another host"}))  # whose processes cannot be seen from here
    os.utime(lease, (time.time() - 2 * STALE,) * 2)
    with Lock(tmp_path, "it", keep=True):
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(30) == 4


@pytest.mark.parametrize("damage", [b"", b"null", b"\xff\xfe", b'{"host": "here"}'])
def test_a_damaged_lease_is_a_holder_until_it_is_old(tmp_path: Path, damage: bytes) -> None:
    lease = set_lease(tmp_path)
    lease.write_bytes(damage)
    assert Lock.holder(tmp_path) is not None
    os.utime(lease, (0, 0))
    assert Lock.holder(tmp_path) is None


def test_a_place_that_is_gone_was_not_taken_over(tmp_path: Path) -> None:
    for gone in (tmp_path / "run", tmp_path / "run" / ".leases"):
        place = tmp_path / "run" / ".leases"
        with Lock(place, "it", keep=True) as held:
            shutil.rmtree(gone)
            with pytest.raises(Vanished, match=f"{gone} is gone: it was deleted, or its storage went away"):
                held.check()


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with Lock(tmp_path, "it", keep=True) as held, pytest.raises(UserError, match="in use"), Lock(tmp_path, "it"):
        held.check()


def test_a_place_is_reserved_until_something_is_there(tmp_path: Path) -> None:
    with reserve(tmp_path / "out") as path:
        with pytest.raises(UserError, match="--out .*out is in use"), reserve(tmp_path / "out"):
            pass
        path.mkdir()
    with pytest.raises(UserError, match="--out .*out: is there already"), reserve(tmp_path / "out"):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_parents_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with reserve(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with reserve(tmp_path / "a" / "out") as path:
        path.mkdir()
    assert path.is_dir()


def test_what_a_killed_command_left_is_removed(tmp_path: Path) -> None:
    host = socket.gethostname()
    left, others = tmp_path / f".out.{host}.7.tmp", [f".out.b.{host}.7.tmp", ".out.txt", "out.tmp"]
    (left / "model").mkdir(parents=True)
    for name in others:
        (tmp_path / name).touch()
    with reserve(tmp_path / "out"):
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="nothing can be written there"), reserve(tmp_path / "file" / "out"):
        pass
    if Path("/proc/self").exists():  # where no folder can be made
        with (
            pytest.raises(UserError, match="--out /proc/nowhere/x: nothing can be written"),
            reserve(Path("/proc/nowhere/x")),
        ):
            pass
