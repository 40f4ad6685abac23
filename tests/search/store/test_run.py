from __future__ import annotations

import os
import shutil
import socket
from functools import partial
from pathlib import Path

import pytest

from prunesweep.models import UserError
from prunesweep.models.io.lock import Lock, Lost
from prunesweep.search.execution.task import run_task
from prunesweep.search.store.run import Result, Run, Task, failure_reasons, reason_of
from tests.search.helpers import make_run, put_model


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.lock() as lock:
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"), run.lock():
            pass
        lock.release()
        with run.lock():
            pass
    assert Lock.holder(run.leases) is None


def test_what_another_driver_took_over_is_not_written_to(tmp_path: Path) -> None:
    made = make_run(tmp_path / "r")
    with made.lock() as lock:
        run = Run(made.path, lock.check)
        run.write_front([])
        (run.leases / f"{lock.number + 1:09d}").write_text("{}")
        for write in (partial(run.write_result, "r0-0000", error="late"), partial(run.write_front, [])):
            with pytest.raises(Lost, match="another process has taken over"):
                write()
        assert run_task(run.path, Task(0, {}, "key", "hash", 0), lock.fence)["state"] == "broken"
    assert not run.failures()


def test_members_of_the_front_have_paths_that_stay(tmp_path: Path) -> None:
    """``front/01`` is the cheapest member, whatever has joined or left, in a copy of the run too."""
    run = make_run(tmp_path / "run", objectives=["top1", "macs"], rank_by="objective")

    def finish(trial: int, macs: int, top1: float) -> None:
        put_model(run.trial(f"r0-000{trial}") / "model")
        result = Result(trial, top1, 0.0, macs, 1, "a", {}, 1.0)
        run.write_result(result.id, result=result)

    def linked(place: Run) -> dict[str, str]:
        return {p.name: p.resolve().parent.name for p in sorted((place / "front").iterdir()) if check(p)}

    def check(path: Path) -> bool:
        return (path / "model.safetensors").is_file()

    for trial, macs, top1 in ((0, 300, 80.0), (1, 100, 70.0), (2, 200, 75.0)):
        finish(trial, macs, top1)
    run.write_front()
    assert linked(run) == {"01": "r0-0001", "02": "r0-0002", "03": "r0-0000"}
    finish(3, 90, 79.0)  # two leave
    run.write_front()
    assert linked(run) == {"01": "r0-0003", "02": "r0-0000"}
    copied = Run(shutil.copytree(run.path, tmp_path / "copy"))  # folders in the place of links
    copied.write_front()
    assert linked(copied) == linked(run)
    assert (copied / "front" / "01").readlink() == Path("../trials/r0-0003/model")
    copied.write_front([])
    assert linked(copied) == {}
    assert check(copied.trial("r0-0003") / "model")


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run: search.toml and run.json are missing"):
        Run.existing(tmp_path)
    run = make_run(tmp_path / "r")
    for place, said in ((tmp_path, f"Runs in it: {run.path}$"), (run / "trials", f"It is in the run {run.path}$")):
        with pytest.raises(UserError, match=said):
            Run.existing(place)
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
