"""How many units of work a search gets through where the work itself is nothing: ``python -m benchmarks.unit_rate``.

The real driver on a Ray of its own: proposals, decoding, files, Tune, reused actors, the front, and what listens
(progress lines, TensorBoard). Units write their result at once, beside an empty model. The rate is taken from the tenth
result on, when the actors are up. ``--long 3000`` is one long search instead, with a row for every window of results:
what the driver takes of time, memory, threads and open files, what the run takes on disk, and how long `status` is.
Writes benchmarks/results/unit_rate.json; each of the two leaves the other's rows as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import timm
from rich.console import Console

from prunesweep.models import arch_of
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions
from prunesweep.search.config import ResourcesTable, SearchTable
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import _board
from prunesweep.search.execution.runtime import RayConnection, execute
from prunesweep.search.report.display import Display
from prunesweep.search.store.run import Result, Run, Task
from prunesweep.search.store.study import Study

from .driver_scale import make_run, make_space
from .upvit_exact import processor

RESULT = Path(__file__).parent / "results" / "unit_rate.json"
WARM = 10  # results
MIB = 2**20


def nothing(path: Path, unit: Task) -> dict[str, Any]:
    """A unit's result without its work."""
    budget, run = unit.point["budget"], Run(path)
    (run.trial(unit.id) / "model").mkdir(exist_ok=True)
    return run.write_result(
        unit.id,
        result=Result(
            trial=unit.number,
            top1=100 * budget,
            zero_shot=0.0,
            macs=round(1e6 * budget),
            params=1,
            arch_hash=unit.arch_hash,
            point=unit.point,
            seconds=0.0,
            key=unit.key,
            rung=unit.rung,
        ),
    )


class Growth:
    """Rows of what a search takes, one for every ``window`` results."""

    def __init__(self, run: Run, coordinator: Coordinator, window: int) -> None:
        self.run, self.coordinator, self.window, self.rows = run, coordinator, window, list[dict[str, float]]()
        self._last = (0, time.monotonic(), 0.0)

    def look(self) -> None:
        """Add a row where a window is full."""
        count, now, spent = len(self.coordinator.results), time.monotonic(), self.coordinator.seconds
        before, then, had = self._last
        if count - before < self.window:
            return
        row = {
            "results": count,
            "units_per_s": round((count - before) / (now - then), 1),
            "driver_ms_per_unit": round(1e3 * (spent - had) / (count - before), 1),
            **_process(),
            "journal_mib": _size(self.run / "study.journal"),
            "board_mib": _size(self.run / "tb"),
        }
        start = time.perf_counter()
        self.run.status()
        row["status_s"] = round(time.perf_counter() - start, 2)
        self.rows.append(row)
        print(row, flush=True)
        self._last = (count, time.monotonic(), spent)


def _process() -> dict[str, float]:
    """What this process has now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_mib": round(int(status["VmRSS"].split()[0]) / 1024),
        "threads": int(status["Threads"]),
        "open_files": len(os.listdir("/proc/self/fd")),
    }


def _size(path: Path) -> float:
    """MiB of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    total = 0
    for file in files:
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return round(total / MIB, 2)


def rate(path: Path, sampler: str, units: int, cpus: int, window: int = 0) -> dict[str, Any]:
    """Units per second with one sampler, and seconds of them that the driver spends on deciding and keeping.

    Args:
        path: where the run is made.
        sampler, units, cpus: of the search.
        window: results to a row of ``Growth``; none by default.
    """
    arch = arch_of(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=4))
    search = SearchTable.model_validate({"trials": units, "rungs": [1], "sampler": sampler, "rank_by": "objective"})
    space, run, resources = make_space(arch), make_run(path / sampler, arch, search), ResourcesTable(cpus=cpus)
    study = Study(
        run / "study.journal",
        space.distributions,
        0,
        objectives=search.objectives,
        sampler=search.sampler,
        trials=search.trials,
    )
    coordinator, seen = Coordinator(run, study, space, search, max_concurrent=1, seed=0), list[tuple[float, int]]()
    growth, display = Growth(run, coordinator, window or units + 1), Display(Console(file=io.StringIO(), width=120))
    source = run.metadata()["source"]
    with (
        display.live(coordinator, source, space.table.budget) as drawn,
        _board(run, coordinator, source) as logged,
        RayConnection(resources, address=None, verbose=False, on_death=lambda: os._exit(1)) as connection,
    ):
        coordinator.max_concurrent = connection.max_concurrent
        begun = time.monotonic()
        changed = [drawn, logged, lambda: seen.append((time.monotonic(), len(coordinator.results))), growth.look]
        execute(coordinator, resources, changed, work=nothing)
    warm, last = next(at for at in seen if at[1] >= WARM), seen[-1]
    return {
        "sampler": sampler,
        "units": units,
        "slots": coordinator.max_concurrent,
        "units_per_s": round((last[1] - warm[1]) / (last[0] - warm[0]), 1),
        "startup_s": round(warm[0] - begun, 1),
        "driver_ms_per_unit": round(1e3 * coordinator.seconds / units, 1),
        **({"growth": growth.rows} if window else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=300)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--samplers", nargs="+", default=("random", "auto", "nsga2"))
    parser.add_argument("--long", type=int, metavar="UNITS", help="one long search instead, with the first sampler")
    parser.add_argument("--window", type=int, default=500, help="of a long search: results to a row")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    about = {"device": processor(), "load_average": round(os.getloadavg()[0], 2), "versions": versions()}
    with tempfile.TemporaryDirectory(prefix="prunesweep-") as folder:
        if args.long:
            found["long"] = {**about, **rate(Path(folder), args.samplers[0], args.long, args.cpus, args.window)}
        else:
            rows = [rate(Path(folder), sampler, args.units, args.cpus) for sampler in args.samplers]
            found = {**about, "rows": rows, **({"long": found["long"]} if "long" in found else {})}
            for row in rows:
                print(row)
    write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
