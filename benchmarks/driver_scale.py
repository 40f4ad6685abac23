"""What the driver of a search costs per trial and per result, as they add up: ``python -m benchmarks.driver_scale``.

The real Coordinator, Study, space and files, and what listens to them (progress line, TensorBoard); no Ray, and no
training: a result is a made-up accuracy, written as a unit would write it, with a small file for the model. ``next`` is
what one unit costs before it starts (proposal, decoding, its files), ``complete`` what its result costs (Optuna's
journal, promotion, front, deleted models), ``report`` what listens. At the end the run is opened again, as a resumed
search does it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import timm
import tomli_w
import torch
from rich.console import Console

from models import Arch, arch_of, cost
from models.files import write_text
from pruners import Scores, vector_sizes
from pruners.nvit import KINDS
from search.config import SearchTable, SpaceTable
from search.coordinator import Coordinator
from search.display import Display
from search.driver import _board
from search.run import Result, Run, Unit
from search.space import Space
from search.study import Study

from .upvit_exact import processor

RESULT = Path(__file__).parent / "results" / "driver_scale.json"
DECODED = 20  # points
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
    write_text(path / "run.json", json.dumps({"source": source, "scores": {}, "versions": {}}))
    write_text(path / "search.toml", tomli_w.dumps({"search": search.model_dump(mode="json", exclude_none=True)}))
    return Run(path)


def work(run: Run, space: Space, unit: Unit, search: SearchTable) -> None:
    """What a unit leaves behind."""
    candidate, folder = space.decode(unit.point), run.trial(unit.id)
    write_text(folder / "arch.json", candidate.arch.to_json())
    trains = not search.rungs or search.rungs[unit.rung] > 0
    if trains:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").touch()
    noise = torch.rand((), generator=torch.Generator().manual_seed(unit.seed)).item()
    result = Result(
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
        has_model=trains,
    )
    run.write_result(unit.id, result=result)


class Clock:
    """Sums of seconds by part, over the window since the last ``row``."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(list)

    def time(self, part: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = call()
        self.spent[part].append(time.perf_counter() - start)
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


def simulate(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    # a small source: what grows with the number of trials does not depend on it, and decoding is timed by itself
    arch = arch_of(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=4))
    search = SearchTable(trials=args.trials, rungs=args.rungs, sampler=args.sampler)
    space, clock, rows = make_space(arch), Clock(), []
    run = make_run(path / "run", arch, search)

    def open_run() -> Coordinator:
        sampler = {"objectives": search.objectives, "sampler": search.sampler, "trials": search.trials}
        study = Study(run / "study.journal", space.distributions, 0, **sampler)  # type: ignore[arg-type]
        return Coordinator(run, study, space, search, slots=args.slots, seed=0)

    coordinator, running = open_run(), deque[Unit]()
    source, started = run.facts()["source"], time.perf_counter()
    display = Display(Console(file=io.StringIO(), width=120))
    with display.live(coordinator, source, space.table.budget) as drawn, _board(run, coordinator, source) as logged:
        while not coordinator.done and time.perf_counter() - started < args.seconds:
            while unit := clock.time("next", coordinator.next):
                running.append(unit)
            clock.spent["next"].pop()  # there was no slot
            unit = running.popleft()
            work(run, space, unit, search)
            clock.time("complete", lambda unit=unit: coordinator.complete(unit.id))
            clock.time("draw", drawn)
            clock.time("board", logged)
            if coordinator.settled % args.every == 0:
                rows.append({"results": coordinator.settled, **clock.row(), **footprint(run)})
                print(rows[-1], flush=True)
    start = time.perf_counter()
    open_run()
    return {
        "decode_ms": decoding(arch),
        "rows": rows,
        "results": coordinator.settled,
        "reopen_s": round(time.perf_counter() - start, 2),
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
    load_file(file)
    read = time.perf_counter()
    size = os.path.getsize(file) / 2**20
    return {"mib": round(size, 1), "write_s": round(written - start, 2), "read_s": round(read - written, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--rungs", type=int, nargs="*", default=(), help="epochs, as in search.rungs")
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--every", type=int, default=500, help="results per row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="give up after")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="prunesweep-") as folder:
        found = {
            "device": processor(),
            "load_average": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "optuna": optuna.__version__,
            **{name: getattr(args, name) for name in ("trials", "rungs", "sampler", "slots")},
            "checkpoint": checkpoint(Path(folder)),
            **simulate(Path(folder), args),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
