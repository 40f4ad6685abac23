"""How many units fit: the arithmetic, without Ray. What becomes of units whose processes do not work, with it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError
from prunesweep.models.io.files import disk_full
from prunesweep.search.config import ResourcesTable
from prunesweep.search.execution import runtime
from prunesweep.search.execution.coordinator import RunBroken
from prunesweep.search.execution.growth import has_autoscaler
from prunesweep.search.execution.runtime import RayConnection, execute, max_concurrent
from prunesweep.search.store.run import Run, Task
from tests.search.execution.test_coordinator import start
from tests.search.execution.test_coordinator import work as made_up
from tests.search.helpers import make_run

GPU_NODE, CPU_NODE = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 6.0}


@pytest.mark.parametrize(
    ("resources", "nodes", "expected"),
    [
        ({}, [CPU_NODE], 6),
        ({"cpus_per_trial": 4}, [CPU_NODE, CPU_NODE], 2),  # a worker lies within one node: not 12 // 4
        ({"cpus_per_trial": 4, "workers_per_trial": 2}, [CPU_NODE, CPU_NODE], 1),  # but a trial need not
        ({"cpus_per_trial": 3, "workers_per_trial": 3}, [CPU_NODE, CPU_NODE], 1),
        ({"gpus_per_trial": 1, "cpus_per_trial": 4}, [GPU_NODE, CPU_NODE], 4),
        ({"gpus_per_trial": 0.3}, [GPU_NODE], 12),  # three to a GPU, never one over two
        ({"gpus_per_trial": 3}, [GPU_NODE, GPU_NODE], 2),
        ({"gpus_per_trial": 1, "workers_per_trial": 8}, [GPU_NODE, GPU_NODE, CPU_NODE], 1),
    ],
)
def test_units_that_fit(resources: dict, nodes: list, expected: int) -> None:
    assert max_concurrent(ResourcesTable(**resources), nodes) == expected


@pytest.mark.parametrize(
    ("gib", "resources", "expected"),
    [(100, {}, 64), (8, {}, 6), (8, {"cpus_per_trial": 4}, 6), (8, {"cpus": 64}, 64), (1, {}, 1)],
)
def test_no_more_units_run_here_than_memory_has_room_for(
    gib: float, resources: dict, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "usable_cpus", lambda: 64)
    monkeypatch.setattr(runtime, "usable_memory", lambda: int(gib * 2**30))
    assert max_concurrent(ResourcesTable(**resources)) == expected


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (
            {"gpus_per_trial": 5},
            "a trial needs 1 x .cpus_per_trial = 1, gpus_per_trial = 5., but the cluster's 2 nodes",
        ),
        ({"workers_per_trial": 30}, "room for 22 of 30 workers"),
    ],
)
def test_a_trial_that_can_never_fit_is_refused_with_the_arithmetic(resources: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        max_concurrent(ResourcesTable(**resources), [GPU_NODE, CPU_NODE])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["importing", "working"])
def test_processes_that_cannot_begin_break_the_run(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver can import what its workers cannot: they are tried again, and then no candidate is blamed."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "only_here.py").write_text(
        "def work(path, unit):\n    raise ImportError('no torch here')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    work = importlib.import_module("only_here").work
    if where == "working":
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{os.environ.get('PYTHONPATH', '')}")
    run, resources = make_run(tmp_path / "run"), ResourcesTable(cpus=1)
    coordinator = start(run, requested=4, max_concurrent=1)
    with (
        RayConnection(resources, address=None, verbose=False, on_death=lambda: None),
        pytest.raises(RunBroken, match="No module named 'only_here'" if where == "importing" else "no torch here"),
    ):
        execute(coordinator, resources, work=work)
    assert run.failures() == {}
    assert coordinator.failures == {}
    again = start(run, requested=4, max_concurrent=1)
    unit = again.next()
    assert unit is not None
    assert unit.number == 0


@pytest.mark.slow
def test_a_process_that_is_lost_again_and_again_fails_its_candidate(tmp_path: Path) -> None:
    run, resources = make_run(tmp_path / "run"), ResourcesTable(cpus=1)
    coordinator, told = start(run, requested=1, max_concurrent=1), list[str]()
    with RayConnection(resources, address=None, verbose=False, on_death=lambda: None):
        execute(coordinator, resources, work=die, note=told.append)
        assert not has_autoscaler()
    assert told == ["trial 0 was lost with its process; it goes on elsewhere from its start"] * 2
    assert list(coordinator.failures) == ["r0-0000"]
    assert "was lost 3 times" in coordinator.failures["r0-0000"]


@pytest.mark.slow
def test_a_node_whose_disk_is_full_gets_no_more_units(tmp_path: Path) -> None:
    """Its unit is done by another one; where all disks are full, the search ends, and nothing has failed."""
    run, resources = make_run(tmp_path / "run"), ResourcesTable(cpus=2)
    (run / "small disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", run / "small disk"], check=False).returncode:
        pytest.skip("only root can mount a small file system")
    told = list[str]()
    try:
        with RayConnection(resources, address=None, verbose=False, on_death=lambda: None):
            coordinator = start(run, requested=4, max_concurrent=2)
            execute(coordinator, resources, work=first_is_full, note=told.append)
            assert [coordinator.finished, len(coordinator.results), len(coordinator.failures)] == [True, 4, 0]
            assert len(told) == 1
            assert told[0].endswith("small disk is full: its trials go elsewhere until 256 MiB are free")

            (run / "full").unlink()
            coordinator = start(run, requested=6, max_concurrent=1)
            with pytest.raises(OSError, match="small disk is full") as found:
                execute(coordinator, resources, work=first_is_full)
            assert disk_full(found.value)
            assert run.failures() == {}
            assert len(run.results()) == 4
    finally:
        subprocess.run(["umount", "--lazy", run / "small disk"], check=True)


def first_is_full(path: Path, unit: Task) -> Mapping[str, Any]:
    """The process that comes first has no room on its disk."""
    run = Run(path)
    with contextlib.suppress(FileExistsError):
        (run / "full").touch(exist_ok=False)
        return {"state": "disk full", "elsewhere": True, "disk": str(run / "small disk")}
    return run.write_result(unit.id, result=made_up(run, unit))


@pytest.mark.slow
def test_a_unit_without_a_process_waits(tmp_path: Path) -> None:
    """Three are handed out where one process fits; the first is lost once, and then waits for another one, too."""
    run, resources = make_run(tmp_path / "run"), ResourcesTable(cpus=1)
    coordinator = start(run, requested=3, max_concurrent=3)
    with run.lock(), RayConnection(resources, address=None, verbose=False, on_death=lambda: None):
        execute(coordinator, resources, work=tell)
    assert len(coordinator.results) == 3
    found = [json.loads(line) for line in (run / "told").read_text().splitlines()]
    assert found == [[1, 2], [1, 2], [1, 1], [1, 0]]
    assert not list(run.path.glob("trials/*/begun"))


def tell(path: Path, unit: Task) -> Mapping[str, Any]:
    """Write how many units run and wait by the run's own account; the first time, die of it."""
    run, found = Run(path), {"running": 0, "waiting": 0}
    deadline = time.monotonic() + 20
    while not found["running"] and time.monotonic() < deadline:  # the driver learns a little later of what has begun
        found = run.status()["tasks"][0]
        time.sleep(0.05)
    first = not (run / "told").exists()
    with (run / "told").open("a") as file:
        file.write(json.dumps([found["running"], found["waiting"]]) + "\n")
    if first:
        die(path, unit)
    return run.write_result(unit.id, result=made_up(run, unit))


def die(_path: Path, _unit: Task) -> dict[str, Any]:
    os._exit(1)
