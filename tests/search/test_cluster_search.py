"""Searches on a cluster: the head has no room for any work, the driver does none, and a node may be lost."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from prunesweep.launch.cluster.inspect_node import inspect_nodes, versions
from prunesweep.launch.doctor import check_nodes
from prunesweep.models import UserError
from prunesweep.search import SearchResult, run_search
from prunesweep.search.config import ResourcesTable, SearchConfig
from prunesweep.search.execution.prepare import prepare_search
from prunesweep.search.execution.remote import run_on_workers
from prunesweep.search.execution.runtime import RayConnection
from prunesweep.search.store.run import Run
from prunesweep.training.jobs.scoring import Progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

EPOCHS = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with one each."""
    memory = {"object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**memory, "num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1, **memory)
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def search(config: SearchConfig, out: Path, cluster: Cluster, text: StringIO) -> SearchResult | None:
    return run_search(config, out, console=Console(file=text, width=200), address=cluster.address)


def makers(text: StringIO) -> list[int]:
    """The processes that worked before the first trial, by their own account."""
    return [int(pid) for pid in re.findall(r"waiting for a worker: [\d.]+, process (\d+)", text.getvalue())]


class When(threading.Thread):
    """Does ``act`` with what ``condition`` gives, once that is true; ``done`` says whether it came to that."""

    def __init__(self, condition: Callable[[], Any], act: Callable[[Any], object]) -> None:
        super().__init__(daemon=True)
        self.condition, self.act, self.done = condition, act, False
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = self.condition()
            if found:
                self.act(found)
                self.done = True
                return
            time.sleep(0.1)


def test_a_users_error_on_a_worker_is_the_users(
    tiny: Callable[..., SearchConfig], cluster: Cluster, tmp_path: Path
) -> None:
    config, text = tiny(data={"name": "imagefolder:/nowhere"}), StringIO()
    with pytest.raises(UserError) as here:
        prepare_search(config, tmp_path / "cache", lambda *_: None)
    with pytest.raises(UserError) as there:
        search(config, tmp_path / "run", cluster, text)
    assert str(there.value) == str(here.value)
    (pid,) = makers(text)
    assert pid != os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_doctor_sees_nodes_that_share_a_folder_of_rays(cluster: Cluster) -> None:
    """As these three do: they are processes of one machine, started without a folder of their own."""
    nodes = inspect_nodes(str(cluster.address), None, None)["nodes"]
    assert [node["sharing"] for node in nodes] == [3, 3, 3]
    (folder,) = {node["session"] for node in nodes}
    assert list(Path(folder).glob(".prunesweep*")) == []
    (finding,) = (one for one in check_nodes(nodes, versions(), None, None) if one.what == "Ray's folder")
    assert (finding.state, finding.found.partition(":")[0].endswith(folder)) == ("warning", True)


def test_work_of_several_workers_ends_with_the_first_error(cluster: Cluster) -> None:
    """And comes back in order where there is none, side by side."""
    told, wait = dict[str, str](), partial(time.sleep, 100)

    def progress(what: str, _: float, note: str) -> None:
        told.setdefault(what, note)

    def number(i: int, report: Progress) -> tuple[int, int]:
        report(f"part {i}", 1.0, "")
        return i, os.getpid()

    def fail(_: Progress) -> None:
        raise UserError("one of them")

    with RayConnection(ResourcesTable(), address=str(cluster.address), verbose=False, on_death=print) as connection:
        assert connection.fitting == 2
        found = run_on_workers([partial(number, i) for i in range(3)], ResourcesTable(), progress)
        assert [i for i, _ in found] == [0, 1, 2]
        assert {"part 0", "part 1", "part 2"} <= set(told)
        begun = time.monotonic()
        with pytest.raises(UserError, match="^one of them$"):
            run_on_workers([lambda _: wait(), fail], ResourcesTable(), progress)
        assert time.monotonic() - begun < 60


def test_the_source_is_made_by_a_worker_that_may_be_killed(
    tiny: Callable[..., SearchConfig], cluster: Cluster, tmp_path: Path
) -> None:
    """Another one goes on. SIGTERM of the driver ends that one too; its state stays, and nothing that is torn."""
    config, text = tiny(source={"train": {"epochs": 5000, "batch_size": 128}}), StringIO()

    def states() -> list[Path]:
        return list(tmp_path.glob("cache/sources/*.state.safetensors"))

    def another_works() -> bool:
        return len(makers(text)) == 2 and states()[0].stat().st_mtime > killed[0]

    def kill(_: object) -> None:
        os.kill(makers(text)[0], signal.SIGKILL)
        killed.append(time.time())

    killed: list[float] = []
    first = When(lambda: states() and makers(text), kill)
    second = When(another_works, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        search(config, tmp_path / "run", cluster, text)
    assert first.done
    assert second.done
    assert len({*makers(text), os.getpid()}) == 3
    (state,) = states()
    before = state.stat().st_mtime_ns
    time.sleep(2)  # an epoch takes a fraction of this
    assert state.stat().st_mtime_ns == before
    killed_writing = f".{makers(text)[0]}.tmp"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(killed_writing)] == [
        state
    ]


def events(run: Run) -> dict[str, list[dict[str, Any]]]:
    """By unit."""
    return {
        path.parent.name: [json.loads(line) for line in path.open()]
        for path in sorted(run.path.glob("trials/*/metrics.jsonl"))
    }


def starts_of(unit: list[dict[str, Any]]) -> list[bool]:
    """Whether it went on from a state, each time that it was begun."""
    return [event["resumed"] for event in unit if event["event"] == "start"]


def test_a_node_is_lost(
    tiny: Callable[..., SearchConfig], cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its unit goes on elsewhere, from its last epoch; nothing fails, and nothing is done twice."""
    config, run, text = tiny(search={"trials": 3}, finetune={"epochs": EPOCHS}), Run(tmp_path / "run"), StringIO()

    def all_work() -> bool:
        """Every node has a unit, with a state to go on from."""
        begun = [path.parent for path in run.path.glob("trials/*/metrics.jsonl")]
        running = [folder for folder in begun if not (folder / "result.json").exists()]
        return len(running) == 2 and all((folder / "state.safetensors").exists() for folder in running)

    when = When(all_work, lambda _: cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False))
    result = search(config, run.path, cluster, text)
    assert when.done
    assert result is not None
    assert result.finished
    assert run.status()["trials"] == {"finished": 3, "running": 0, "pending": 0, "failed": 0}
    assert "1 unit fits on the cluster's nodes now, before it were 2" in text.getvalue()
    (lost,) = re.findall(r"trial \d was lost with its node; it goes on elsewhere from epoch \d+", text.getvalue())
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert "Error" not in printed

    found = events(run)
    (moved,) = (unit for unit, of in found.items() if len(starts_of(of)) == 2)
    assert f"trial {int(moved.rpartition('-')[2])} " in lost
    assert sorted(map(starts_of, found.values())) == [[False], [False], [False, True]]
    for of in found.values():
        assert [event["event"] for event in of].count("end") == 1
        assert of[-1]["event"] == "end"
        epochs = [event["epoch"] for event in of if event["event"] == "epoch"]
        assert len(set(epochs)) == len(epochs)
        assert len(set(range(1, EPOCHS + 1)) - set(epochs)) <= len(starts_of(of)) - 1  # a line not yet written
