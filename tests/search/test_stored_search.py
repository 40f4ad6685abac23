"""Searches whose runs lie on an S3 server: equal to those in a folder, killed, gone on with elsewhere, on a cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from prunesweep.models.io.objects import Objects
from prunesweep.search import resume_search, run_search
from prunesweep.search.config import SearchConfig, load_run_config
from prunesweep.search.execution.reopen import write_config
from prunesweep.search.execution.task import run_task
from prunesweep.search.store.run import Run
from prunesweep.search.store.stored import view
from prunesweep.search.verify import verify
from tests.object_store import Store, serving
from tests.search.in_process import without_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as found:
        yield found


def cache_of(place: Path) -> Path:
    """Where another machine has its caches."""
    return place / "home"


def worth(run: Run) -> list[tuple[Any, ...]]:
    return [(r.id, r.key, r.loss, r.top1, r.macs) for r in run.results()]


def test_a_search_on_s3_is_the_search_in_a_folder_and_goes_on_elsewhere(
    tiny: Callable[..., SearchConfig], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine goes on from the store alone, and does nothing again."""
    without_ray(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    url, config = store.url("runs/equal"), tiny(search={"trials": 2})
    objects = Objects(url)
    first = run_search(config, url)
    folder = run_search(config, tmp_path / "folder" / "run")
    assert first is not None
    assert folder is not None
    assert first.path.is_relative_to(tmp_path / "one")
    assert worth(Run(first.path)) == worth(Run(folder.path))
    assert Run(first.path).front() == Run(folder.path).front()
    published = {name: objects.read(name) for name in objects.list("trials/") if name.endswith("result.json")}
    assert len(published) == 2

    shutil.rmtree(tmp_path / "one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    second = resume_search(url, trials=3)
    assert second.finished
    assert {name: objects.read(name) for name in published} == published
    assert events(Run(second.path)).count("start") == 3

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    found = Run(view(url))
    assert [r.id for r in found.results()] == ["r0-0000", "r0-0001", "r0-0002"]
    assert found.front() == Run(second.path).front()
    assert found.status()["driver"] is None
    assert verify(found.path) == []


DRIVER = """
import sys
import pytest
import torch
from prunesweep.search import resume_search, run_search
from tests.search.in_process import without_ray
torch.set_num_threads(1)
with pytest.MonkeyPatch.context() as patch:
    without_ray(patch)
    run_search(sys.argv[1], sys.argv[2]) if sys.argv[1] else resume_search(sys.argv[2])
"""


def test_kill_9_between_a_trials_files_and_its_result(
    tiny: Callable[..., SearchConfig], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine publishes what it had finished when it goes on; nothing is lost, and nothing is done twice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    url, file = store.url("runs/killed"), tmp_path / "tiny.toml"
    file.write_text(tiny(search={"trials": 2}).to_toml())
    asked = threading.Event()

    def fails(method: str, path: str) -> bool:
        result = method == "PUT" and path.endswith("r0-0000/result.json")
        if result:
            asked.set()
        return result

    store.fails = fails
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(file), url], cwd=Path(__file__).parents[2])
    try:
        assert asked.wait(200)
    finally:
        driver.kill()
        driver.wait()
        store.fails = lambda *_: False
    there = Objects(url).list("trials/r0-0000/")
    assert "trials/r0-0000/model/model.safetensors" in there
    assert "trials/r0-0000/result.json" not in there

    subprocess.run([sys.executable, "-c", DRIVER, "", url], cwd=Path(__file__).parents[2], check=True)
    found = Run(view(url))
    assert [r.id for r in found.results()] == ["r0-0000", "r0-0001"]
    assert events(found, "r0-0000").count("start") == 1  # the other one may have begun before the kill
    assert verify(found.path) == []


def events(run: Run, unit: str = "*") -> list[str]:
    """What all trials, or one, tell of, in the order of trials."""
    logs = sorted(run.path.glob(f"trials/{unit}/metrics.jsonl"))
    return [json.loads(line)["event"] for log in logs for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def cluster(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without CPUs, and two nodes that keep what they have in folders of their own."""
    homes, memory = tmp_path_factory.mktemp("homes"), {"object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**memory, "num_cpus": 0, "include_dashboard": False})
    for name in ("left", "right"):
        found.add_node(num_cpus=1, env_vars={"XDG_CACHE_HOME": str(homes / name)}, **memory)
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def test_nodes_share_nothing_but_the_store(
    tiny: Callable[..., SearchConfig],
    cluster: Cluster,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The source is made by one of them, and trials by both; models come back, and a later rung starts from them.

    Trials of two workers, of which one is killed, give what one worker gives.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_of(tmp_path)))
    url, text = store.url("runs/cluster"), StringIO()
    config = tiny(search={"trials": 4, "rungs": [1, 2], "reduction_factor": 2})
    result = run_search(config, url, console=Console(file=text, width=200), address=str(cluster.address))
    assert result is not None
    assert result.finished
    run = Run(result.path)
    assert run.path.is_relative_to(cache_of(tmp_path))
    assert run.failures() == {}
    assert {r.id for r in run.results() if r.rung == 0} == {f"r0-000{i}" for i in range(4)}
    assert sum(r.rung == 1 for r in run.results()) == 2
    assert {point["split"] for point in run.front()} == {"val"}

    objects = Objects(url)
    there = set(objects.list())
    for r in run.results():
        assert f"trials/{r.id}/result.json" in there
    for point in run.front():
        assert f"{point['model']}/model.safetensors" in there
    assert not [name for name in there if name.startswith((".prepared/", "trials/")) and "/start/" in name]
    homes = [Path(n) for n in cluster_homes(cluster)]
    assert all(list(home.glob("prunesweep/stores/*/workers/*/source/config.json")) for home in homes)
    assert not any(list(home.glob("prunesweep/stores/*/workers/*/trials/*")) for home in homes)
    assert not any(list(home.glob("prunesweep/stores/*/runs/*")) for home in homes)

    shutil.rmtree(cache_of(tmp_path))  # another machine goes on, and with trials of two workers
    killed = list[str]()

    def kill_a_worker() -> None:
        while not killed:
            time.sleep(0.05)
            for log in cache_of(tmp_path).glob("prunesweep/stores/*/runs/cluster/trials/*/metrics.jsonl"):
                for pid in re.findall(r"2 workers: .* process (\d+)", log.read_text())[:1]:
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(log.parent.name)

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    wide = ["resources.workers_per_trial=2"]
    again = resume_search(url, trials=5, overrides=wide, address=str(cluster.address), console=Console(quiet=True))
    thread.join(timeout=1)
    (unit,) = killed
    assert again.finished
    run = Run(again.path)
    assert len([r for r in run.results() if r.rung == 0]) == 5
    assert json.loads(objects.read("front.json")) == run.front()
    assert len(re.findall(r"2 workers: ", (run.trial(unit) / "metrics.jsonl").read_text())) == 2
    assert verify(run.path) == []
    assert not [n for n in objects.list() if re.search(r"/(start|made)/|state\.safetensors|\.workers", n)]

    alone = Run(shutil.copytree(run.path, tmp_path / "alone", symlinks=True))  # where one process does it
    shutil.rmtree(alone.trial(unit) / "model", ignore_errors=True)
    (alone.trial(unit) / "result.json").unlink()
    config = load_run_config(alone.path, ["resources.workers_per_trial=1"])
    write_config(alone.path, config)
    found = run_task(alone.path, alone.read_task(unit))["result"]
    (mine,) = (r for r in run.results() if r.id == unit)
    assert (found["key"], found["macs"], found["images"]) == (mine.key, mine.macs, mine.images)
    assert found["loss"] == pytest.approx(mine.loss, rel=1e-4)


def cluster_homes(cluster: Cluster) -> list[str]:
    return [node._ray_params.env_vars["XDG_CACHE_HOME"] for node in cluster.worker_nodes]
