"""What a terminal says of a search while it runs: a line per result, tasks that run, how far it is, the live view."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.store.front import COSTS, OBJECTIVES, OWN, cost_of, hypervolume, quality_of, values
from prunesweep.search.store.progress import Level, levels, running_task, time_left
from prunesweep.search.store.records import Result

from .words import COST_NAMES, HEADINGS, MEASURES, clock, counts, front_line, named, task_line

__all__ = ["live_view", "result_line", "state_line"]

WIDTH = 120  # characters of a line, at most
BANDS = 5  # of the budget window
SHOWN = 8  # running tasks that are named


def result_line(result: Result, coordinator: Coordinator, source: Mapping[str, Any]) -> str:
    """Say what a task gave, in at most 120 characters: quality, what it was compared by, costs over the source's.

    It begins with how many tasks of its rung have finished by now, of how many.

    Args:
        result: of the task.
        coordinator: the search.
        source: the source's costs by name.
    """
    objectives = coordinator.search.objectives
    level = tasks_of(coordinator)[result.rung]
    several = len(coordinator.search.rungs) > 1
    quality = quality_of(objectives)
    if not all(map(math.isfinite, values(result, objectives))):
        found = "diverged, which counts as worse than all others"
    else:
        names = dict.fromkeys([quality, *coordinator.search.ranking.names(result.epochs)])
        measured = {name: getattr(result, name) for name in names if name not in COSTS}
        own = coordinator.search.quality
        found = ", ".join(_figure(name, value, own) for name, value in measured.items() if value is not None)
    costs = ", ".join(_cost(name, getattr(result, name), source) for name in objectives if name in COSTS)
    line = f"[{counts(level, several)}] trial {result.trial}: {found}, {costs}"
    return f"{line}, {result.seconds:.1f} s"[:WIDTH]


def _figure(name: str, value: float, own: str | None) -> str:
    unit, word = " %" if name in ("top1", "balanced", "agreement") else "", named(name, MEASURES, own)
    return f"{word} {value:.2f}{unit}" if name in OBJECTIVES and name not in OWN else f"{word} {value:.4g}"


def _cost(name: str, value: float, source: Mapping[str, Any]) -> str:
    return f"{value / source[name]:.3f} of the {COST_NAMES[name]}"


def tasks_of(coordinator: Coordinator, waiting: Collection[str] = ()) -> list[Level]:
    """The tasks of a search that is running here, rung by rung; ``waiting``: names of those that no process does."""
    search = coordinator.search
    table = {"trials": search.trials, "rungs": search.rungs, "reduction_factor": search.reduction_factor}
    running = [unit for unit in coordinator.handed_out if unit not in waiting]
    return levels(table, coordinator.results, coordinator.failures, running=running, waiting=waiting)


class _Now:
    """What runs in a search, and how long the rest takes, as of one moment."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.time = time.time()
        self.several = len(coordinator.search.rungs) > 1
        self.tasks = [running_task(coordinator.run, unit) for unit in coordinator.handed_out]
        running = [task for task in self.tasks if not task["waiting"]]
        self.waiting = [task["unit"] for task in self.tasks if task["waiting"]]
        self.levels = tasks_of(coordinator, self.waiting)
        ran = {task["unit"]: max(self.time - (task["since"] or self.time), 0.0) for task in running}
        self.left = time_left(self.levels, coordinator.results, ran, coordinator.max_concurrent)

    @property
    def done(self) -> str:
        return ", ".join(counts(level, self.several) for level in self.levels) + " done"

    @property
    def going(self) -> str:
        waiting = f", {len(self.waiting)} waiting for a worker" if self.waiting else ""
        return f"{len(self.tasks) - len(self.waiting)} running{waiting}"

    @property
    def lines(self) -> list[str]:
        return [task_line(task, self.several, self.time) for task in self.tasks]


def state_line(coordinator: Coordinator, elapsed: float) -> str:
    """Say in at most 120 characters how far a search is; for output that is not a terminal.

    Args:
        coordinator: the search.
        elapsed: seconds since this session began.
    """
    now = _Now(coordinator)
    line = f"{now.done}, {clock(elapsed)} elapsed, ETA {clock(now.left)}; {now.going}"
    for text in now.lines[:SHOWN]:
        if len(line) + len(text) + 3 > WIDTH:
            break
        line += f" | {text}"
    return line[:WIDTH]


def live_view(
    coordinator: Coordinator, source: Mapping[str, Any], window: tuple[float, float], elapsed: float
) -> RenderableType:
    """Build what a terminal shows while a search runs.

    How far it is and how long the rest takes, the front's hypervolume, the best quality in every band of the budget
    window, and the tasks that run.

    Args:
        coordinator: the search.
        source: the source's costs by name.
        window: smallest and largest budget, as shares of the source's cost.
        elapsed: seconds since this session began.
    """
    now, objectives = _Now(coordinator), coordinator.search.objectives
    state = Text(
        f"{now.done}, {now.going}, {len(coordinator.failures)} failed; {clock(elapsed)} elapsed, ETA {clock(now.left)}"
    )
    if coordinator.stopping:
        state.append("  stopping", style="yellow")
    front = Text(front_line(len(coordinator.front), hypervolume(coordinator.best, source, objectives), objectives))
    more = len(now.lines) - SHOWN
    running = [Text(f"  {line}") for line in [*now.lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])]]
    return Group(state, front, _bands(coordinator, source, window), *running)


def _bands(coordinator: Coordinator, source: Mapping[str, Any], window: tuple[float, float]) -> Table:
    """The best quality among models in every band of the first cost."""
    objectives = coordinator.search.objectives
    quality, cost = quality_of(objectives), cost_of(objectives)
    best = min if OBJECTIVES[quality] == "minimize" else max
    found = [r for r in coordinator.current if r.has_model and math.isfinite(getattr(r, quality))]
    low, high = window
    edges = [0.0, *(low + (high - low) * i / BANDS for i in range(1, BANDS + 1))]  # coarse units can undershoot
    bands = list(pairwise(edges))
    table = Table(f"{COST_NAMES[cost]} / source", *(f"{a:.2f}-{b:.2f}" for a, b in bands), box=None, pad_edge=False)
    cells = [
        best((getattr(r, quality) for r in found if a < getattr(r, cost) / source[cost] <= b), default=None)
        for a, b in bands
    ]
    digits, heading = 4 if quality in OWN else 2, named(quality, HEADINGS, coordinator.search.quality)
    table.add_row(f"best {heading}", *("-" if cell is None else f"{cell:.{digits}f}" for cell in cells))
    return table
