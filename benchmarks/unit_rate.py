"""How many units of work a search gets through where the work itself is nothing: ``python -m benchmarks.unit_rate``.

The real driver on a Ray of its own: proposals, decoding, files, Tune, reused actors and the front. Units write their
result at once. The rate is taken from the tenth result on, when the actors are up. Writes
benchmarks/results/unit_rate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import timm

from prunesweep.models import arch_of
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions
from prunesweep.search.config import ResourcesTable, SearchTable
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.runtime import RayConnection, execute
from prunesweep.search.store.run import Result, Run, Task
from prunesweep.search.store.study import Study

from .driver_scale import make_run, make_space
from .upvit_exact import processor

RESULT = Path(__file__).parent / "results" / "unit_rate.json"
WARM = 10  # results


def nothing(path: Path, unit: Task) -> dict[str, Any]:
    """A unit's result without its work."""
    budget = unit.point["budget"]
    return Run(path).write_result(
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
            has_model=False,
        ),
    )


def rate(path: Path, sampler: str, units: int, cpus: int) -> dict[str, Any]:
    """Units per second with one sampler, and seconds of them that the driver spends on deciding and keeping."""
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
    with RayConnection(resources, address=None, verbose=False, on_death=lambda: os._exit(1)) as connection:
        coordinator.max_concurrent = connection.max_concurrent
        begun = time.monotonic()
        changed = [lambda: seen.append((time.monotonic(), len(coordinator.results)))]
        execute(coordinator, resources, changed, work=nothing)
    warm, last = next(at for at in seen if at[1] >= WARM), seen[-1]
    return {
        "sampler": sampler,
        "units": units,
        "slots": coordinator.max_concurrent,
        "units_per_s": round((last[1] - warm[1]) / (last[0] - warm[0]), 1),
        "startup_s": round(warm[0] - begun, 1),
        "driver_ms_per_unit": round(1e3 * coordinator.seconds / units, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=300)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--samplers", nargs="+", default=("random", "auto", "nsga2"))
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(prefix="prunesweep-") as folder:
        rows = [rate(Path(folder), sampler, args.units, args.cpus) for sampler in args.samplers]
    for row in rows:
        print(row)
    write_text(
        RESULT,
        json.dumps({"device": processor(), "load_average": load, "versions": versions(), "rows": rows}, indent=1)
        + "\n",
    )


if __name__ == "__main__":
    main()
