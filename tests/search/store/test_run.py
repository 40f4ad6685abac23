from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError
from prunesweep.search.store.run import Run, RunLock, failure_reasons, reason_of
from tests.search.helpers import make_run


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lease:
        assert RunLock.holder(tmp_path)["pid"] == os.getpid()
        with (
            pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"),
            RunLock(tmp_path),
        ):
            pass
        lease.release()
        with RunLock(tmp_path):
            pass
    assert RunLock.holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def enter_together(folder: Path, rounds: int, barrier: Any) -> None:
    """In every round find a dead driver's lease, at the same time as another process, and note whether it was taken."""
    dead = json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "started": ""})
    for number in range(rounds):
        (folder / "lease.json").write_text(dead)
        barrier.wait(30)
        with contextlib.suppress(UserError), RunLock(folder):
            (folder / f"{number}-{os.getpid()}").touch()
            barrier.wait(30)
            continue
        barrier.wait(30)


def test_of_two_processes_that_find_a_dead_drivers_lease_one_takes_it(tmp_path: Path) -> None:
    started, rounds = multiprocessing.get_context("fork"), 200
    barrier = started.Barrier(2)
    processes = [started.Process(target=enter_together, args=(tmp_path, rounds, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len({path.name.split("-")[0] for path in tmp_path.glob("*-*")}) == rounds
    assert len(list(tmp_path.glob("*-*"))) == rounds


def test_a_lease_that_another_driver_took_over_is_left_to_it(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / "lease.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": ""}))
    assert RunLock.holder(tmp_path)["host"] == "elsewhere"


def test_a_dead_drivers_lease_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from prunesweep.search.store.run import RunLock, Path\n"
        "RunLock(Path(sys.argv[1])).__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / "lease.json").exists()
    assert RunLock.holder(tmp_path) is None
    with RunLock(tmp_path):
        assert RunLock.holder(tmp_path)["pid"] == os.getpid()


def test_a_reused_process_number_is_not_taken_for_the_driver(tmp_path: Path) -> None:
    stale = {"host": socket.gethostname(), "pid": os.getpid(), "started": "1"}
    (tmp_path / "lease.json").write_text(json.dumps(stale))
    assert RunLock.holder(tmp_path) is None


def test_another_hosts_lease_ends_without_its_heartbeat(tmp_path: Path) -> None:
    lease = tmp_path / "lease.json"
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": ""}))
    assert RunLock.holder(tmp_path) is not None
    os.utime(lease, (0, 0))
    assert RunLock.holder(tmp_path) is None


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run: search.toml and run.json are missing"):
        Run.existing(tmp_path)
    run = make_run(tmp_path / "r")
    assert Run.existing(run.path).metadata()["source"]["top1"] == 90.0
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is damaged"):
        run.metadata()


def test_errors_are_told_by_the_line_that_says_what_happened() -> None:
    inner = "Traceback (most recent call last):\n  File 'a.py', line 1, in f\n    g()\nKeyError: 'x'\n"
    outer = (
        "Traceback (most recent call last):\n  File 'b.py', line 2, in h\nprunesweep.models.errors.UserError: no\nway"
    )
    caused = f"{inner}\nDuring handling of the above exception, another exception occurred:\n\n{outer}\n"
    plain = "the unit's process was lost 3 times"
    assert [reason_of(error) for error in (inner, outer, caused, plain, "")] == [
        "KeyError: 'x'",
        "no",
        "no",
        plain,
        "no reason is known",
    ]
    memory = "Traceback (most recent call last):\n  a\ntorch.OutOfMemoryError: 3 GiB\n"
    failures = {f"r0-{number:04d}": memory for number in range(6)} | {"r1-0001": plain}
    assert failure_reasons(failures) == [
        "6 x OutOfMemoryError: 3 GiB (r0-0000, r0-0001, r0-0002, r0-0003, ...)",
        f"1 x {plain} (r1-0001)",
    ]
