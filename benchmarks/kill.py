"""Kill a search at random moments until it is done: is anything lost, or done twice?

    python -m benchmarks.kill [--kills 100]

A tiny joint search on digits is left alone and timed. Then it is started again, its driver (and at times all of Ray
with it) is killed with SIGKILL after a random time, from long before its first result to a sixth of what follows, and
it is resumed, until it ends; and so on until there were kills enough. Writes benchmarks/results/kill.json after every
search: results lost, units run twice, and whether the candidates are those of a search that was left alone (with one
worker and a sampler that depends on results alone they should be).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prunesweep.models.io.provenance import versions
from prunesweep.search.store.run import Run

RESULTS = Path(__file__).parent / "results" / "kill.json"
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


def command(*arguments: str) -> subprocess.Popen[bytes]:
    """The command line in a session of its own, so that everything it starts can be killed at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "prunesweep", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def undisturbed(config: Path, run: Run) -> tuple[float, float]:
    """Seconds until the first result, and until the end."""
    begun, first = time.monotonic(), 0.0
    process = command("search", str(config), "--out", str(run.path))
    while process.poll() is None:
        time.sleep(0.1)
        if not first and (run / "run.json").exists() and run.results():
            first = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"{process.args!r} ended with {process.returncode}")
    return first, time.monotonic() - begun


def ends(run: Run) -> dict[str, int]:
    """How often every unit came to its end."""
    found = {}
    for path in (run / "trials").glob("*/metrics.jsonl"):
        events = [json.loads(line)["event"] for line in path.read_text().splitlines() if line.endswith("}")]
        found[path.parent.name] = events.count("end")
    return found


def candidates(run: Run) -> list[Any]:
    return sorted((r.trial, r.rung, r.key) for r in run.results())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moment = random.Random(given.seed)
    searches: list[dict[str, Any]] = []
    kills = 0
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "kill.toml")
        config.write_text(CONFIG)
        alone = Run(Path(folder, "alone"))
        first, whole = undisturbed(config, alone)
        print(f"left alone: {first:.0f} s to the first result, {whole:.0f} s in all", flush=True)
        while kills < given.kills:
            run = Run(Path(folder, f"killed-{len(searches)}"))
            own, seen = 0, set()
            process = command("search", str(config), "--out", str(run.path))
            while True:
                wait = moment.uniform(first / 4, first + (whole - first) / 6) if kills < given.kills else None
                try:
                    process.wait(wait)
                    break
                except subprocess.TimeoutExpired:
                    with_ray = moment.random() < 0.3
                    os.killpg(process.pid, signal.SIGKILL) if with_ray else process.kill()
                    process.wait()
                    kills, own = kills + 1, own + 1
                    seen |= {r.id for r in run.results()} if (run / "run.json").exists() else set()
                    time.sleep(1)
                    made = (run / "run.json").exists()
                    arguments = ("resume", str(run.path)) if made else ("search", str(config), "--out", str(run.path))
                    process = command(*arguments)
            done = {r.id for r in run.results()}
            searches.append(
                {
                    "kills": own,
                    "exit_code": process.returncode,
                    "lost": sorted(seen - done),
                    "twice": sorted(unit for unit, count in ends(run).items() if count > 1),
                    "same_candidates": candidates(run) == candidates(alone),
                    "finished": run.status()["trials"]["finished"],
                }
            )
            print(searches[-1], flush=True)
            keep(kills, searches)


def keep(kills: int, searches: list[dict[str, Any]]) -> None:
    """Write what came of all kills until now."""
    summary = {
        "kills": kills,
        "lost": sum(len(s["lost"]) for s in searches),
        "twice": sum(len(s["twice"]) for s in searches),
        "same_candidates": all(s["same_candidates"] for s in searches),
    }
    print(summary, flush=True)
    RESULTS.write_text(json.dumps({**summary, "versions": versions(), "searches": searches}, indent=1))


if __name__ == "__main__":
    main()
