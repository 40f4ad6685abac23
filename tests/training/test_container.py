"""A container's CPU quota bounds what runs side by side."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from prunesweep.models import UserError
from prunesweep.search import run_search
from prunesweep.training.container import check_shared_memory, memory_kills, usable_cpus, usable_memory
from tests.conftest import tiny_config

OWN = 64


def test_where_no_memory_can_be_shared_it_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_shared_memory()

    def lock() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(multiprocessing, "Lock", lock)
    with pytest.raises(UserError, match="/dev/shm is missing or full"):
        check_shared_memory()
    with pytest.raises(UserError, match="/dev/shm is missing or full"):
        run_search(tiny_config(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(OWN)))


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "max 100000\n"}, OWN),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, OWN),
        ({"cpu.max": "torn"}, OWN),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, OWN),
        ({}, OWN),
    ],
)
def test_cpus_that_a_quota_leaves(files: dict[str, str], cpus: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == cpus


V1 = "4:memory:/pod/one\n1:cpu,cpuacct:/pod/one\n"


@pytest.mark.parametrize(
    ("files", "own", "gib"),
    [
        ({"memory.max": f"{4 * 2**30}\n"}, "0::/\n", 4),
        ({"memory.max": "max\n"}, "0::/\n", None),
        ({"pod/memory.max": f"{2**30}\n", "pod/one/memory.max": "max\n"}, "0::/pod/one\n", 1),
        ({"pod/memory.max": f"{2**30}\n"}, "0::/other\n", None),
        ({"memory/memory.limit_in_bytes": f"{2**30}\n"}, V1, 1),
        ({"memory/pod/one/memory.limit_in_bytes": f"{2**30}\n", "memory/memory.limit_in_bytes": f"{2**63}"}, V1, 1),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, V1, None),
        ({}, "", None),
    ],
)
def test_memory_that_a_limit_leaves(files: dict[str, str], own: str, gib: int | None, tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert usable_memory(tmp_path, tmp_path / "own") == (whole if gib is None else min(gib * 2**30, whole))


def test_processes_that_were_killed_for_memory_are_counted(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text(V1)
    assert memory_kills(tmp_path, own) == 0
    (tmp_path / "memory/pod/one").mkdir(parents=True)
    (tmp_path / "memory/pod/one/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert memory_kills(tmp_path, own) == 3
    own.write_text("0::/\n")
    (tmp_path / "memory.events").write_text("low 0\noom 7\noom_kill 5\noom_group_kill 0\n")
    assert memory_kills(tmp_path, own) == 5
