"""Kill parts of a cluster of three nodes while a search runs on it: is anything lost, done twice, or left?

    python -m benchmarks.kill_cluster [--what worker node ...] [--kills 5] [--place folder|store]

A head without room for work and three nodes of one CPU each, all on this machine. A search (a tiny joint one on digits)
runs on them; again and again something is killed with SIGKILL after a random time:

    driver          the search's command; it is started again and goes on (``resume``)
    worker          a process that does a trial
    train-worker    one of the two processes that train a trial together (``workers_per_trial = 2``)
    raylet          the node manager of a node; another node joins some seconds later
    node            all processes of a node at once; another node joins some seconds later
    outage          nothing; the store answers 500 to every request for some seconds (``--place store`` alone)
    disk            nothing; the disk of one node is full for some seconds (``--place store`` alone, as root)

``--place folder`` has the run in a folder that all nodes see, ``--place store`` on an S3 server, with nodes that see
nothing but their own folders. Writes benchmarks/results/kill_cluster.json: results that are lost, done twice or failed,
what ``verify`` finds at the end, placement groups and actors that are left on the cluster, and after how many seconds
interrupted work went on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

import psutil  # isort: skip

from benchmarks.kill import CONFIG, MARK, NAMES, ended_twice
from prunesweep.models.io.provenance import versions
from prunesweep.search.store.run import Run
from prunesweep.search.store.stored import view
from prunesweep.search.verify import verify
from tests.object_store import Store, serving

RESULTS = Path(__file__).parent / "results" / "kill_cluster.json"
KINDS = ("driver", "worker", "train-worker", "raylet", "node", "outage", "disk")
MEMORY = {"object_store_memory": 80 * 2**20}
ABSENT = 5.0  # seconds until another node takes the place of one that was lost
OUTAGE = 30.0  # seconds for which the store fails
FULL = 20.0  # seconds for which a disk is full
DISK = 400  # MiB of the disk of one node
LEFT = """
import json, sys, ray
from ray.util import placement_group_table
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
groups = [one["name"] or key for key, one in placement_group_table().items() if one["state"] != "REMOVED"]
actors = [one for one in ray._private.state.actors().values() if one["State"] != "DEAD"]
actors = [one for one in actors if one["ActorClassName"] != "_AutoscalingCoordinatorActor"]  # Ray Train's, for all runs
print(json.dumps([f"placement group {name}" for name in groups] + [f"actor {one['ActorClassName']}" for one in actors]))
"""


class Nodes:
    """The cluster, and the folders that its nodes have for themselves."""

    def __init__(self, place: Path, shared: bool) -> None:
        self.place, self.shared, self.made = place, shared, 0
        self.disk = place / "homes" / "node1"
        if not shared:
            self.disk.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", self.disk], check=True)
        options = {**MEMORY, "num_cpus": 0, "include_dashboard": False, "env_vars": self.environment("head")}
        self.cluster = Cluster(initialize_head=True, head_node_args=options)
        for _ in range(3):
            self.add()

    def environment(self, name: str) -> dict[str, str]:
        home = self.place / "homes" / ("shared" if self.shared else name)
        return {MARK: str(self.place), "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1"}

    def add(self) -> None:
        self.made += 1
        self.cluster.add_node(num_cpus=1, env_vars=self.environment(f"node{self.made}"), **MEMORY)

    def lose(self, moment: random.Random, whole: bool) -> None:
        """Kill a node's manager, or all that it has started; another node joins after a while."""
        node = moment.choice(sorted(self.cluster.worker_nodes, key=lambda one: one.node_id))
        (manager,) = node.all_processes["raylet"]
        found = psutil.Process(manager.process.pid)
        victims = [found, *(found.children(recursive=True) if whole else ())]
        for one in victims:
            with contextlib.suppress(psutil.Error):
                one.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        time.sleep(ABSENT)
        self.add()

    def fill(self) -> None:
        """Leave no room on the disk of one node for a while."""
        file = self.disk / "filler"
        with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
            while out.write(bytes(2**20)) == 2**20:
                continue
        time.sleep(FULL)
        file.unlink()

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of all nodes that do a kind of work."""
        found = []
        for node in self.cluster.worker_nodes:
            (manager,) = node.all_processes["raylet"]
            with contextlib.suppress(psutil.Error):
                found += [
                    one
                    for one in psutil.Process(manager.process.pid).children(recursive=True)
                    if "".join(one.cmdline()[:1]).startswith(name)
                ]
        return found

    def left(self) -> list[str]:
        """Actors and placement groups that are still there."""
        deadline = time.monotonic() + 30
        while True:
            line = [sys.executable, "-c", LEFT, str(self.cluster.address)]
            text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
            found: list[str] = json.loads(text.splitlines()[-1])
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(2)


class Search:
    """A search of the command line on the cluster, and what became of it."""

    def __init__(self, place: Path, name: str, config: Path, nodes: Nodes, store: Store | None) -> None:
        self.place, self.config, self.nodes = place, config, nodes
        self.out = store.url(f"runs/{name}") if store else str(place / "runs" / name)
        self.output = place / f"{name}.output"
        self.start()

    def start(self) -> None:
        begun = self.run() is not None
        line = ["resume", self.out] if begun else ["search", str(self.config), "--out", self.out]
        environment = {**os.environ, **self.nodes.environment("head"), "TMPDIR": str(self.place / "tmp")}
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prunesweep", *line, "--address", str(self.nodes.cluster.address)],
                stdout=file,
                stderr=file,
                env=environment,
                cwd=self.place,
                start_new_session=True,
            )

    def run(self) -> Run | None:
        """The run as it can be seen now; None where nothing was made yet."""
        try:
            found = Run(view(self.out) if "://" in self.out else Path(self.out))
            return found if (found.path / "run.json").exists() else None
        except Exception:  # the store does not answer, or has nothing
            return None

    def wait(self, seconds: float | None) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def interrupt(what: str, search: Search, nodes: Nodes, store: Store | None, moment: random.Random) -> bool:
    """Kill a part; False where there is none now."""
    if what == "driver":
        search.process.kill()
        search.process.wait()
        time.sleep(1)
        search.start()
    elif what in ("raylet", "node"):
        nodes.lose(moment, whole=what == "node")
    elif what == "disk":
        nodes.fill()
    elif what == "outage":
        assert store is not None
        store.fails = lambda *_: True
        time.sleep(OUTAGE)
        store.fails = lambda *_: False
    else:
        found = nodes.processes(NAMES[what])
        if not found:
            return False
        with contextlib.suppress(psutil.Error):
            moment.choice(found).send_signal(signal.SIGKILL)
    return True


def series(
    what: str, search: Search, nodes: Nodes, store: Store | None, kills: int, moment: random.Random, span: float
) -> dict[str, Any]:
    """Interrupt a search until there were interruptions enough, let it end, and say what came of it."""
    moments, seen = list[float](), set[str]()
    while search.run() is None and search.wait(0.5) is None:
        continue
    while search.wait(moment.uniform(span / 4, span) if len(moments) < kills else None) is None:
        if (run := search.run()) is not None:
            seen |= {result.id for result in run.results()}
        when = time.time()
        if interrupt(what, search, nodes, store, moment):
            moments.append(when)
    code, run = search.process.returncode, search.run()
    text = search.output.read_text(errors="replace")
    print("\n".join(line for line in text.splitlines() if "full" in line or "lost" in line), flush=True)
    for unit, why in run.failures().items() if run is not None else ():
        print(f"{unit} failed: {why[-1500:]}", flush=True)
    if code or run is None:
        print(text[-3000:], flush=True)
        return {"kills": len(moments), "exit_code": code, "output": text[-3000:]}
    return {
        "kills": len(moments),
        "exit_code": code,
        "finished": len(run.results()),
        "lost": sorted(seen - {result.id for result in run.results()}),
        "twice": ended_twice(run),
        "failed": sorted(run.failures()),
        "verify": [str(one) for one in verify(run.path)],
        "goes_on": [seconds for when in moments if (seconds := went_on(run, when)) is not None],
        "noise": [word for word in ("Traceback", "StackTrace", "Check failed") if word in text],
        "left": nodes.left(),
    }


def went_on(run: Run, when: float) -> float | None:
    """Seconds until one of the units that were under way at a time began again; None where none had to."""
    found = []
    for path in (run.path / "trials").glob("*/metrics.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        before = [event["event"] for event in events if event["time"] < when]
        after = [event["time"] for event in events if event["time"] >= when and event["event"] == "start"]
        if before and "end" not in before and after:
            found.append(min(after) - when)
    return min(found, default=None)


@contextlib.contextmanager
def cluster_of(place: Path, kind: str) -> Iterator[tuple[Nodes, Store | None]]:
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(serving()) if kind == "store" else None
        nodes = Nodes(place, shared=kind == "folder")
        try:
            yield nodes, store
        finally:
            ray.shutdown()
            nodes.cluster.shutdown()
            if not nodes.shared:
                subprocess.run(["umount", "--lazy", nodes.disk], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=KINDS, default=["driver", "worker", "raylet", "node"])
    parser.add_argument("--place", choices=("folder", "store"), default="folder")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--most", type=int, default=3, help="interruptions of one search, before it may end")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pk", dir="/tmp") as folder:
        place = Path(folder)
        for name in ("tmp", "runs"):
            (place / name).mkdir()
        with cluster_of(place, given.place) as (nodes, store):
            for what in given.what:
                config = place / f"{what}.toml"
                together = "\nworkers_per_trial = 2" if what == "train-worker" else ""
                config.write_text(CONFIG.replace("rungs = [1, 2]", "rungs = [4, 12]") + together)
                begun = time.monotonic()
                alone = series(
                    what, Search(place, f"{what}-alone", config, nodes, store), nodes, store, 0, random.Random(0), 1
                )
                seconds = time.monotonic() - begun
                print(what, f"left alone: {seconds:.0f} s", json.dumps(alone), flush=True)
                found, moment = list[dict[str, Any]](), random.Random(given.seed)
                while sum(one["kills"] for one in found) < given.kills:
                    most = min(given.most, given.kills - sum(one["kills"] for one in found))
                    search = Search(place, f"{what}-{len(found)}", config, nodes, store)
                    begun = time.monotonic()
                    one = series(what, search, nodes, store, most, moment, seconds / 3)
                    found.append({**one, "seconds": time.monotonic() - begun})
                    print(what, json.dumps(found[-1]), flush=True)
                    keep(f"{what}, {given.place}", alone, seconds, found)


def keep(name: str, alone: dict[str, Any], seconds: float, found: list[dict[str, Any]]) -> None:
    """Write what came of all interruptions of a kind until now, beside what is known of the others."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    again = sorted(one for each in found for one in each.get("goes_on", ()))
    known[name] = {
        "kills": sum(one["kills"] for one in found),
        **{
            what: sum(len(one.get(what, ())) for one in found) for what in ("lost", "twice", "failed", "verify", "left")
        },
        "ended": sum(one["exit_code"] == 0 for one in found),
        "searches": len(found),
        "seconds_to_go_on": again,
        "seconds_alone": seconds,
        "alone": alone,
        "versions": versions(),
        "series": found,
    }
    RESULTS.write_text(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
