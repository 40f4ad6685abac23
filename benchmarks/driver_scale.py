"""What the driver of a search costs per trial and per result, as they add up: ``python -m benchmarks.driver_scale``.

The real Coordinator, Study, space and files, and what listens to them (progress line, TensorBoard); no Ray, and no
training. A run is filled with made-up results, opened as a resumed search does it (``open_ms``), and gone on with:
``next`` is what a unit costs before it starts (proposal, decoding, its files), ``complete`` what its result costs
(Optuna's journal, promotion, front, models that are deleted), ``draw`` and ``board`` what listens; each in seconds and,
as ``_cpu``, in those of the processor. A unit leaves behind what a real one leaves, but for the weights.

``--nodes 1000`` is a whole search instead, on so many nodes with one unit each, in made-up time: units take seconds by
their epochs, and the driver what it really takes. The row of it goes beside the others.
"""

from __future__ import annotations

import argparse
import heapq
import io
import json
import os
import platform
import resource
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import timm
import tomli_w
import torch
from rich.console import Console

from prunesweep.models import Arch, arch_of, cost
from prunesweep.models.io.files import write_text
from prunesweep.pruners import Scores, vector_sizes
from prunesweep.pruners.nvit.schedule import KINDS
from prunesweep.search.config import SearchTable, SpaceTable
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import _board
from prunesweep.search.report.display import Display
from prunesweep.search.space.space import Candidate, Space
from prunesweep.search.store.records import FORMAT, sealed
from prunesweep.search.store.run import Result, Run, Task
from prunesweep.search.store.study import Study

from .upvit_exact import processor

RESULT = Path(__file__).parent / "results" / "driver_scale.json"
DECODED, SHAPES = 20, 32  # points
EPOCH = 120.0  # made-up seconds, give or take a fifth
STATES = 4  # tensors of a training state per parameter: weight, its average, Adam's two moments


def make_space(arch: Arch) -> Space:
    """A joint space, with made-up scores; nearly every point has a path of widths of its own."""
    generator = torch.Generator().manual_seed(0)
    sizes = vector_sizes(arch, KINDS)
    widths = Scores({name: torch.rand(n, generator=generator, dtype=torch.float64) for name, n in sizes.items()})
    depth = Scores({"depth": torch.rand(arch.depth, generator=generator, dtype=torch.float64)})
    table = SpaceTable(budget=(0.35, 0.9), skip=(0, 3), conv=(0, 3), mlp_weight=(0.5, 2.0), lr=(3e-5, 5e-4))
    return Space(table, arch, {"nvit": widths, "depth_kl": depth})


def make_run(path: Path, arch: Arch, search: SearchTable) -> Run:
    (path / "trials").mkdir(parents=True)
    spent = cost(arch)
    source = {"name": "made up", "weights": "", "top1": 80.0, "macs": spent.macs, "params": spent.params}
    write_text(path / "run.json", sealed({"format": FORMAT, "source": source, "scores": {}, "versions": {}}))
    write_text(path / "search.toml", tomli_w.dumps({"search": search.model_dump(mode="json", exclude_none=True)}))
    return Run(path)


def made_up(unit: Task, candidate: Candidate, search: SearchTable) -> Result:
    noise = float(np.random.default_rng(unit.seed).random())
    return Result(
        trial=unit.number,
        top1=60 + 20 * unit.point["budget"] ** 0.3 + 2 * noise + unit.rung,
        zero_shot=10.0,
        macs=candidate.cost.macs,
        params=candidate.cost.params,
        arch_hash=candidate.arch.hash,
        point=unit.point,
        seconds=1.0,
        key=unit.key,
        rung=unit.rung,
        has_model=search.rungs[unit.rung] > 0,
    )


def work(run: Run, space: Space, unit: Task, search: SearchTable) -> None:
    """What a unit does and leaves behind, but for the training."""
    candidate, folder = space.decode(unit.point), run.trial(unit.id)
    write_text(folder / "arch.json", candidate.arch.to_json())
    result = made_up(unit, candidate, search)
    if result.has_model:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").touch()
    run.write_result(unit.id, result=result)


class Clock:
    """Sums of seconds by part, over the window since the last ``row``."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(list)

    def time(self, part: str, call: Callable[[], Any]) -> Any:
        start, busy = time.perf_counter(), time.process_time()
        found = call()
        self.spent[part].append(time.perf_counter() - start)
        self.spent[f"{part}_cpu"].append(time.process_time() - busy)
        return found

    def row(self) -> dict[str, float]:
        found = {f"{part}_ms": round(1e3 * sum(s) / len(s), 2) for part, s in self.spent.items()}
        self.spent.clear()
        return found


def decoding() -> float:
    """Milliseconds to decode a point for DeiT-S, whose path of widths has to be found first."""
    arch = arch_of(timm.create_model("deit_small_patch16_224"))
    points, space = make_space(arch).summarise(DECODED, 0).points, make_space(arch)  # one that knows no path yet
    start = time.perf_counter()
    for point in points:
        space.decode(point)
    return round(1e3 * (time.perf_counter() - start) / len(points), 1)


def fill(run: Run, study: Study, space: Space, search: SearchTable, count: int) -> None:
    """``count`` candidates that have finished, the share that is due of them on every rung."""
    rng = np.random.default_rng(0)
    shapes = [space.complete(point) for point in space.summarise(SHAPES, 0).points]
    points = [{**shapes[i % len(shapes)], "lr": float(rng.uniform(3e-5, 5e-4))} for i in range(count)]
    known = [space.decode(point) for point in shapes]
    rungs = [int(count // search.reduction_factor**rung) for rung in range(len(search.rungs))]
    values = []
    for rung, promoted in zip(range(len(rungs)), [*rungs[1:], 0], strict=True):
        for number in range(rungs[rung]):
            unit = Task(number, points[number], "", f"made up {number}", number, rung)
            result = made_up(unit, known[number % len(known)], search)
            folder = run.trial(unit.id)
            folder.mkdir()
            (folder / "result.json").write_text(sealed({"state": "finished", "result": asdict(result)}))
            if result.has_model and number >= promoted:  # the others' models were taken over by the next rung
                (folder / "model").mkdir()
            if rung == 0:
                values.append([result.top1, float(result.macs)])
    distributions = space.distributions
    study._study.add_trials(
        optuna.trial.create_trial(
            params={name: point[name] for name in distributions}, distributions=distributions, values=value
        )
        for point, value in zip(points, values, strict=True)
    )


def simulate(path: Path, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Go on with a run of ``count`` candidates for ``args.results`` results."""
    # a small source: what grows with the number of trials does not depend on it, and decoding is timed by itself
    arch = arch_of(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=4))
    ladder = {"rungs": args.rungs, "sampler": args.sampler}
    search = SearchTable(trials=count + args.results, **ladder, rank_by="objective")  # all that is made up is top-1
    space, clock, running = make_space(arch), Clock(), deque[Task]()
    run = make_run(path / str(count), arch, search)

    def open_study() -> Study:
        sampler = {"objectives": search.objectives, "sampler": search.sampler, "trials": search.trials}
        return Study(run / "study.journal", space.distributions, 0, **sampler)  # type: ignore[arg-type]

    fill(run, open_study(), space, search, count)
    coordinator: Coordinator = clock.time(
        "open", lambda: Coordinator(run, open_study(), space, search, max_concurrent=args.slots, seed=0)
    )
    before, source = coordinator.settled, run.metadata()["source"]
    display = Display(Console(file=io.StringIO(), width=120))
    with display.live(coordinator, source, space.table.budget) as drawn, _board(run, coordinator, source) as logged:
        while not coordinator.done and coordinator.settled - before < args.results:
            while unit := clock.time("next", coordinator.next):
                running.append(unit)
            clock.spent["next"].pop()  # there was no slot
            clock.spent["next_cpu"].pop()
            unit = running.popleft()
            work(run, space, unit, search)
            clock.time("complete", lambda unit=unit: coordinator.complete(unit.id))
            clock.time("draw", drawn)
            clock.time("board", logged)
    return {"candidates": count, "results": before, **clock.row(), **footprint(run)}


def whole_search(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A search on ``args.nodes`` nodes from its first candidate to its end, in made-up time."""
    arch = arch_of(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=4))
    search = SearchTable(trials=args.trials, rungs=(1, 3, 9), sampler=args.sampler, rank_by="objective")
    space, run = make_space(arch), make_run(path / "whole", arch, search)
    sampler: dict[str, Any] = {"objectives": search.objectives, "sampler": search.sampler, "trials": search.trials}
    study = Study(run / "study.journal", space.distributions, 0, **sampler)
    coordinator = Coordinator(run, study, space, search, max_concurrent=args.nodes, seed=0)
    source, display = run.metadata()["source"], Display(Console(file=io.StringIO(), width=120))
    computed = 0.0
    running, busy, now, spent, begun = list[tuple[float, int, Task]](), 0.0, 0.0, 0.0, time.monotonic()
    with display.live(coordinator, source, space.table.budget) as drawn, _board(run, coordinator, source) as logged:
        while not coordinator.done:
            start, processor = time.perf_counter(), time.process_time()
            while unit := coordinator.next():
                own = EPOCH * search.rungs[unit.rung] * (0.8 + 0.4 * float(np.random.default_rng(unit.seed).random()))
                took = time.perf_counter() - start
                now, spent, busy, start = now + took, spent + took, busy + own, start + took
                heapq.heappush(running, (now + own, unit.seed, unit))
            computed += time.process_time() - processor
            end, _, unit = heapq.heappop(running)
            work(run, space, unit, search)
            start, processor = time.perf_counter(), time.process_time()
            coordinator.complete(unit.id)
            drawn()
            logged()
            took = time.perf_counter() - start
            now, spent, computed = max(now, end) + took, spent + took, computed + time.process_time() - processor
            if coordinator.settled % 500 == 0:
                print(coordinator.settled, round(now), round(spent), round(time.monotonic() - begun), flush=True)
    units = len(coordinator.results)
    return {
        "nodes": args.nodes,
        "candidates": search.trials,
        "units": units,
        "failed": len(coordinator.failures),
        "finished": coordinator.finished,
        "made_up_hours": round(now / 3600, 2),
        "nodes_busy": round(busy / (args.nodes * now), 3),
        "driver_ms_per_unit": round(1e3 * spent / units, 1),
        "driver_cpu_ms_per_unit": round(1e3 * computed / units, 1),
        "driver_share": round(spent / now, 3),
        "front": len(coordinator.front),
        **footprint(run),
    }


def footprint(run: Run) -> dict[str, float]:
    """Memory now, the journal, and what TensorBoard's logs of the search take."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    boards = sum(p.stat().st_size for p in (run / "tb").rglob("*") if p.is_file())
    return {
        "memory_mib": round(pages * resource.getpagesize() / 2**20),
        "journal_mib": round((run / "study.journal").stat().st_size / 2**20, 2),
        "board_mib": round(boards / 2**20, 2),
    }


def checkpoint(path: Path) -> dict[str, float]:
    """A training state of DeiT-S, which units write after every epoch and the driver never reads."""
    from safetensors.torch import load_file, save_file

    params = sum(p.numel() for p in timm.create_model("deit_small_patch16_224").parameters())
    file = str(path / "state.safetensors")
    state = {str(i): torch.rand(params) for i in range(STATES)}
    start = time.perf_counter()
    save_file(state, file)
    written = time.perf_counter()
    _ = [tensor.clone() for tensor in load_file(file).values()]
    read = time.perf_counter()
    size = os.path.getsize(file) / 2**20
    return {"mib": round(size, 1), "write_s": round(written - start, 2), "read_s": round(read - written, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=(100, 1000, 3000, 10_000), help="there already")
    parser.add_argument("--results", type=int, default=150, help="that are added to them, and timed")
    parser.add_argument("--rungs", type=int, nargs="+", default=(0, 1, 3, 9), help="epochs, as in search.rungs")
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=0, help="a whole search on so many instead")
    parser.add_argument("--trials", type=int, default=4000, help="candidates of that")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="prunesweep-") as folder:
        if args.nodes:
            row = {"device": processor(), "load_average": round(os.getloadavg()[0], 2)}
            row |= whole_search(Path(folder), args)
            print(row, flush=True)
            kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
            write_text(args.out, json.dumps({**kept, "whole_search": row}, indent=1) + "\n")
            return
        found = {
            "device": processor(),
            "load_average": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "optuna": optuna.__version__,
            **{name: getattr(args, name) for name in ("results", "rungs", "sampler", "slots")},
            "checkpoint": checkpoint(Path(folder)),
            "decode_ms": decoding(),
            "rows": [],
        }
        if args.out.is_file() and (kept := json.loads(args.out.read_text()).get("whole_search")):
            found["whole_search"] = kept
        for count in args.candidates:
            found["rows"].append(simulate(Path(folder), count, args))
            print(found["rows"][-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
