"""Nodes that come when asked: a search that begins without any, grows, and gives back what it does not need."""

from __future__ import annotations

import multiprocessing
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from prunesweep.models import UserError
from prunesweep.search.config import ClusterTable, ResourcesTable
from prunesweep.search.execution.growth import Waiting, has_autoscaler
from prunesweep.search.execution.runtime import RayConnection, execute
from prunesweep.search.store.run import Run, Task
from prunesweep.search.tracking.ray_metrics import gauges
from tests.launch.head import running_head
from tests.search.execution.test_coordinator import start
from tests.search.execution.test_coordinator import work as made_up
from tests.search.helpers import make_run


def test_it_is_said_what_is_waited_for_at_growing_intervals() -> None:
    now, told = [0.0], list[str]()
    waiting = Waiting(ResourcesTable(cpus_per_trial=4, gpus_per_trial=1), told.append, lambda: now[0])
    for second in range(300):
        now[0] = second
        waiting.look(True, "; 2 units have been handed out")
    texts = [
        f"waiting for a node with 4 CPUs and 1 GPUs for {s} s; 2 units have been handed out" for s in (30, 90, 210)
    ]
    assert told == texts
    waiting.look(False)
    now[0] += 29
    waiting.look(True)
    assert len(told) == 3  # a new wait begins


def test_a_unit_that_fits_on_none_of_the_nodes_that_may_come_is_refused() -> None:
    with pytest.raises(UserError, match=r"cluster.gpus offer 8 CPUs and 0 GPUs, .* room for 0 of 1 workers$"):
        RayConnection(
            ResourcesTable(gpus_per_trial=1),
            address="auto",
            verbose=False,
            on_death=lambda: None,
            cluster=ClusterTable(max_nodes=2),
        )


def exported(url: str, name: str, value: float) -> None:
    """Wait for what Prometheus is given of a search to come to a value."""
    deadline, found = time.monotonic() + 30, ""
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url, timeout=5) as answer:
            found = answer.read().decode()
        lines = [line for line in found.splitlines() if line.startswith(f"{name}{{") and 'run="one"' in line]
        if lines and float(lines[0].split()[-1]) == value:
            return
        time.sleep(0.5)
    raise AssertionError(found[-3000:])


def hold(path: Path, unit: Task) -> dict[str, Any]:
    """Trial 0 ends when it may; the others when two nodes are there."""
    for_what, deadline = path / ("shrunk" if unit.number == 0 else "grown"), time.monotonic() + 100
    while not for_what.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    made_up(Run(path), unit)
    return {"state": "finished"}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_cluster_without_nodes_grows_and_shrinks_with_the_work_that_is_left(tmp_path: Path) -> None:
    """Two units run side by side once both nodes are there; the one that has nothing to do goes before the end.

    In a process of its own: Ray keeps how it was first reached, and where it was first measured.
    """
    with running_head(cpus=0, comes=(1, 2)) as head, pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(head.folder))
        process = multiprocessing.get_context("spawn").Process(target=grow, args=(tmp_path, head.gcs, head.metrics))
        process.start()
        process.join(150)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0


def grow(path: Path, address: str, metrics: str) -> None:
    run, resources, seen = make_run(path / "run"), ResourcesTable(), [0]
    coordinator = start(run, requested=2, max_concurrent=0)
    table = ClusterTable(max_nodes=2, cpus=1)
    options: dict[str, Any] = {"address": address, "verbose": False, "on_death": lambda: None}
    with RayConnection(resources, cluster=table, **options) as connection:
        assert (connection.fitting, connection.max_concurrent, connection.most) == (0, 2, 2)

        def count() -> int:
            now = sum(node["Alive"] for node in ray.nodes()) - 1
            if seen[-1] != now:
                seen.append(now)
                if now == 2:
                    (run / "grown").touch()
                elif now == 1 and (run / "grown").exists():
                    (run / "shrunk").touch()
            return connection.max_concurrent

        changed = gauges("one", coordinator, run.searched_source())
        execute(coordinator, resources, [changed], count=count, work=hold)
        assert has_autoscaler()
        exported(metrics, "ray_prunesweep_tasks_done", 2.0)
    assert coordinator.finished
    assert seen in ([0, 1, 2, 1], [0, 2, 1])
    assert coordinator.failures == {}
