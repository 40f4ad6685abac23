"""Kill commands at random moments until they are done: is anything lost, done twice, other than it was, or left?

    python -m benchmarks.kill [--what driver raylet finetune ...] [--kills 100]

A search (a tiny joint one on digits) or another command is left alone and timed. Then it is started again, something of
it is killed with SIGKILL after a random time, and the same command (``resume``, of a search) goes on with what is left,
until there were kills enough and it ends. What can be killed:

    driver                  a search's command, at times with all of Ray
    worker, raylet, gcs     a process of a search's Ray: one that does trials, its node manager, its central store
    train-worker            one of the processes in which ``finetune --workers 2`` trains
    finetune                ``finetune --workers 2``: the command, or its Ray's node manager or central store
    prune                   ``prune --method uvc --finetune quick``
    promote, export, fetch, instant, score

Writes benchmarks/results/kill.json: results that are lost, done twice, or other than those of a command that was left
alone (with one worker there should be none); how a command ended whose Ray was killed, and after how many seconds; and
what is left: processes, temporary folders, shared memory, hidden files beside the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray  # noqa: F401  (it brings psutil along)

import psutil  # isort: skip
import torch

from prunesweep.models import load
from prunesweep.models.io.provenance import versions
from prunesweep.search.store.run import Run

RESULTS = Path(__file__).parent / "results" / "kill.json"
MARK = "PRUNESWEEP_KILL"  # in the environment of everything that is started here
PATIENCE = 20.0  # seconds in which the processes of a command that was killed must end
NAMES = {
    "worker": "ray::ResourceTrainable",
    "train-worker": "ray::RayTrainWorker",
    "raylet": "raylet",
    "gcs": "gcs_server",
}
CONFIG = """
name = "kill"
[data]
name = "digits"
[source]
model = "vit_tiny_patch16_224"
pos_embed_std = 0.5
[source.args]
patch_size = 2
embed_dim = 16
depth = 3
num_heads = 2
[source.train]
epochs = 1
lr = 2e-3
batch_size = 128
[scores]
images = 64
[space]
budget = [0.3, 0.9]
skip = [0, 1]
conv = [0, 1]
keep_rate = [0.5, 1.0]
lr = [5e-4, 3e-3]
[space.groups]
embed = 4
heads = 1
qk = 2
v = 2
mlp = 8
[search]
trials = 18
rungs = [1, 2]
[finetune]
epochs = 1
batch_size = 128
[[finetune.distill]]
[resources]
cpus = 1
"""


@dataclass
class Work:
    """A command, what goes on with it, what of it is killed, and what came of it."""

    begin: list[str]
    again: Callable[[], list[str]]
    victims: tuple[str, ...]
    result: Path
    outcome: Callable[[], Any]
    finished: Callable[[], set[str]] = set
    twice: Callable[[], list[str]] = list
    failed: Callable[[], list[str]] = list  # candidates whose process was killed three times
    published: bool = True  # the result appears at the end, and the command then says that it is there


class Started:
    """The command line in a session of its own, so that everything it starts can be killed at once."""

    def __init__(self, place: Path, arguments: list[str]) -> None:
        self.output = place / "output"
        environment = {**os.environ, MARK: str(place), "TMPDIR": str(place / "tmp"), "OMP_NUM_THREADS": "1"}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prunesweep", *arguments],
                stdout=file,
                stderr=file,
                env=environment,
                cwd=place,
                start_new_session=True,
            )

    def kill(self, what: str, moment: random.Random) -> bool:
        """Kill a part of it; False where there is none now."""
        if what == "driver":
            with_ray = moment.random() < 0.3
            os.killpg(self.process.pid, signal.SIGKILL) if with_ray else self.process.kill()
            return True
        with contextlib.suppress(psutil.Error):
            found = [one for one in psutil.Process(self.process.pid).children(recursive=True) if _is(one, NAMES[what])]
            if found:
                moment.choice(found).kill()
                return True
        return False


def _is(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        line = process.cmdline()
        return bool(line) and Path(line[0].split()[0] if line[0] else "").name.startswith(name)
    return False


def left(place: Path, result: Path, memory: set[str]) -> list[str]:
    """What commands that have ended have left, but for results and caches."""
    deadline = time.monotonic() + PATIENCE
    while (alive := _alive(str(place))) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = [f"process {name}" for name in alive]
    others = ("torchinductor", "wandb")  # of libraries: timm loads wandb where that is installed
    temporary = [path.name for path in (place / "tmp").iterdir()]
    found += [f"tmp/{name}" for name in temporary if not any(other in name for other in others)]
    found += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - memory]
    for path in result.parent.rglob(".*"):
        if ".leases" not in path.relative_to(place).parts:  # of a search's run
            found.append(str(path.relative_to(place)))
    return found


def _alive(mark: str) -> list[str]:
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if one.pid != os.getpid() and one.environ().get(MARK) == mark and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one.name())
    return found


def series(place: Path, work: Work, kills: int, span: tuple[float, float], moment: random.Random) -> dict[str, Any]:
    """Kill until there were kills enough, let it end, and say how every kill ended, and what is left."""
    memory = set(os.listdir("/dev/shm"))
    ends, seen, begun = list[dict[str, Any]](), set[str](), time.monotonic()
    started = Started(place, work.begin)
    while True:
        code = _wait(started, moment.uniform(*span) if len(ends) < kills else None)
        if code is not None:
            break
        what, when = moment.choice(work.victims), time.monotonic()
        if not started.kill(what, moment):
            continue
        if what in ("worker", "train-worker"):
            ends.append({"killed": what, "goes_on": _wait(started, 1.0) in (None, 0)})
            continue
        code = started.process.wait()
        ends.append({"killed": what})
        if what != "driver":
            text = started.output.read_text(errors="replace")
            said = [line for line in text.splitlines() if "Ray died" in line]
            noise = [word for word in ("Traceback", "(raylet)", "StackTrace", "Check failed") if word in text]
            ends[-1] |= {"exit_code": code, "seconds": time.monotonic() - when, "lines": len(said), "noise": noise}
            if code != 3 or len(said) != 1:
                print(text[-2000:], flush=True)
        seen |= work.finished()
        time.sleep(1)
        if work.published and work.result.exists():  # it was killed when all was done
            code, ends[-1]["done"] = 0, True
            break
        started = Started(place, work.again())
    if code:
        print(started.output.read_text(errors="replace")[-2000:], flush=True)
    return {
        "kills": len(ends),
        "exit_code": code,
        "lost": sorted(seen - work.finished()),
        "twice": work.twice(),
        "failed": work.failed(),
        "seconds": time.monotonic() - begun,
        "ends": ends,
        "left": left(place, work.result, memory),
    }


def _wait(started: Started, seconds: float | None) -> int | None:
    try:
        return started.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def of_run(run: Run) -> list[Any]:
    """What a search found; with one worker and a sampler that depends on results alone it is always the same."""
    return sorted((r.trial, r.rung, r.key, r.loss) for r in run.results())


def ended_twice(run: Run) -> list[str]:
    """Units that came to their end more than once."""
    found = []
    for path in (run / "trials").glob("*/metrics.jsonl"):
        events = [json.loads(line)["event"] for line in path.read_text().splitlines() if line.endswith("}")]
        found += [path.parent.name] * (events.count("end") > 1)
    return sorted(found)


def of_models(result: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of all models in a folder, by their places."""
    folders = sorted(path.parent for path in result.rglob("config.json"))
    return {str(folder.relative_to(result)): load(folder).state_dict() for folder in folders}


def of_export(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {"": dict(torch.export.load(file).state_dict)}


def differs(one: Any, other: Any) -> Any:
    """False where two outcomes are equal, or the largest difference of a weight."""
    if isinstance(one, dict) and one.keys() == other.keys():
        pairs = [(one[place][name], other[place][name]) for place in one for name in one[place]]
        if all(a.shape == b.shape for a, b in pairs):
            return (
                max(
                    (float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs if a.numel()),
                    default=0.0,
                )
                or False
            )
    return one != other


def search_work(what: str, place: Path, config: Path, name: str) -> Work:
    run = Run(place / name)

    def made() -> bool:
        return (run / "run.json").exists()

    begin = ["search", str(config), "--out", str(run.path)]
    return Work(
        begin=begin,
        again=lambda: ["resume", str(run.path)] if made() else begin,
        victims=(what,),
        result=run.path,
        outcome=lambda: of_run(run),
        finished=lambda: {r.id for r in run.results()} if made() else set(),
        twice=lambda: ended_twice(run),
        failed=lambda: sorted(run.failures()) if made() else [],
        published=False,
    )


def command_work(what: str, place: Path, source: Path, kept: Path, name: str) -> Work:
    """A command other than a search; ``kept`` is a finished run."""
    out, data = place / name / ("out.pt2" if what == "export" else "out"), ["--data", "digits"]
    trained = ["--teacher", str(source), "--epochs", "12", "--workers", "2", *data]
    uvc = "--method uvc --budget 0.7 --recipe quick --set recipe.epochs=6 --set ramp_steps=20 --finetune quick"
    lines = {
        "finetune": ["finetune", str(source), "--out", str(out), *trained],
        "prune": ["prune", str(source), "--out", str(out), *uvc.split(), "--set", "finetune.epochs=6", *data],
        "instant": ["instant", str(source), "--out", str(out), "--budgets", "0.7,0.5,0.3", *data],
        "export": ["export", str(source), "--to", "torch-export", "--out", str(out)],
        "score": ["score", str(source), "--method", "nvit", "--cache", str(out), *data],
        "promote": ["promote", str(out), "--top", "1", "--recipe", "quick", "--set", "epochs=8"],
    }
    victims = {"finetune": ("driver", "raylet", "gcs"), "train-worker": ("train-worker",)}
    line = lines["finetune" if what == "train-worker" else what]
    out.parent.mkdir()
    outcome: dict[str, Callable[[], Any]] = {
        "export": lambda: of_export(out),
        "score": lambda: sorted((path.name, path.read_bytes()) for path in out.iterdir()),
        "promote": lambda: of_models(out / "promoted"),
    }
    if what == "promote":
        shutil.copytree(kept, out)
    found = outcome.get(what, lambda: of_models(out))
    published = what not in ("score", "promote")
    return Work(line, lambda: line, victims.get(what, ("driver",)), out, found, published=published)


@contextlib.contextmanager
def fetching(place: Path, kept: Path) -> Iterator[Callable[[str], Work]]:
    """A head that a run was submitted to, by what it says; the run itself is one that is finished."""
    from prunesweep.launch.cluster.client import Cluster
    from prunesweep.launch.cluster.package import environment, staged
    from prunesweep.search.config import ClusterTable
    from tests.launch.head import running_head

    with running_head() as head:
        cluster = Cluster(head.url)
        facts = {"prunesweep": "search", "run": "kept", "folder": str(kept), "pip": ""}
        facts["config"] = (kept / "search.toml").read_text()
        with staged() as code:
            cluster.submit("kept-a1", "true", code, environment(ClusterTable(), pip=False), facts)

        def work(name: str) -> Work:
            out = place / name / "out"
            out.parent.mkdir()
            line = ["fetch", "kept", "--address", head.url, "--out", str(out)]
            return Work(line, lambda: line, ("driver",), out, lambda: of_models(out))

        yield work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    searches = ("driver", "worker", "raylet", "gcs")
    commands = ("train-worker", "finetune", "prune", "promote", "export", "instant", "score", "fetch")
    parser.add_argument("--what", nargs="+", choices=[*searches, *commands], default=["driver"])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--most", type=int, default=5, help="kills of one search or command, before it may end")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pk", dir="/tmp") as folder, contextlib.ExitStack() as stack:
        place = Path(folder)
        (place / "tmp").mkdir()
        config = place / "kill.toml"
        config.write_text(CONFIG)
        first, whole = _alone(place, search_work("driver", place, config, "kept"))
        kept = place / "kept"
        for what in given.what:
            if what in searches:
                made: Callable[[str], Work] = partial(search_work, what, place, config)
                expected, span = of_run(Run(kept)), (first / 4, first + (whole - first) / 6)
                if what != "driver":
                    span = (first / 2, first + (whole - first) / 2)
            else:
                made = partial(command_work, what, place, kept / "source", kept)
                if what == "fetch":
                    made = stack.enter_context(fetching(place, kept))
                alone = made(f"{what}-alone")
                _, seconds = _alone(place, alone)
                expected, span = alone.outcome(), (seconds / 8, seconds * 0.8)
                span = (seconds / 4, seconds) if what == "train-worker" else span
            found, moment = list[dict[str, Any]](), random.Random(given.seed)
            while sum(one["kills"] for one in found) < given.kills:
                work = made(f"{what}-{len(found)}")
                most = min(given.most, given.kills - sum(one["kills"] for one in found))
                one = series(place, work, most, span, moment)
                one["differs"] = True if one["exit_code"] else differs(expected, work.outcome())
                found.append(one)
                print(what, json.dumps(one), flush=True)
                keep(what, found)


def _alone(place: Path, work: Work) -> tuple[float, float]:
    """Seconds until the first result of a search, and until the end, of what is left alone."""
    begun, first = time.monotonic(), 0.0
    started = Started(place, work.begin)
    while _wait(started, 0.1) is None:
        if not first and work.finished():
            first = time.monotonic() - begun
    if started.process.returncode:
        raise SystemExit(f"{work.begin} ended with {started.process.returncode}:\n{started.output.read_text()[-2000:]}")
    whole = time.monotonic() - begun
    print(f"{work.begin[0]} left alone: {first:.0f} s to the first result, {whole:.0f} s in all", flush=True)
    return first, whole


def keep(what: str, found: list[dict[str, Any]]) -> None:
    """Write what came of all kills of a kind until now, beside what is known of the others."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    ends = [end for one in found for end in one["ends"]]
    known[what] = {
        "kills": len(ends),
        "lost": sum(len(one["lost"]) for one in found),
        "twice": sum(len(one["twice"]) for one in found),
        "failed": sum(len(one.get("failed", [])) for one in found),
        "equal": sum(one["differs"] is False for one in found),
        "largest_difference": max(float(one["differs"]) for one in found),
        "ended": len(found),
        "left": sum(len(one["left"]) for one in found),
        "ray_died_exit_codes": sorted({end["exit_code"] for end in ends if "exit_code" in end}),
        "ray_died_seconds": max((end["seconds"] for end in ends if "seconds" in end), default=None),
        "goes_on": sum(end.get("goes_on", False) for end in ends),
        "versions": versions(),
        "series": found,
    }
    RESULTS.write_text(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
