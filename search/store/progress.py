"""How far a search is: its tasks rung by rung, what is running and since when, and how long the rest takes."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunesweep.models.io.lock import Lock

from .records import Result, place_of

if TYPE_CHECKING:
    from .run import Run

__all__ = ["BEGUN", "REDUCTION_FACTOR", "Level", "events", "levels", "planned", "progress", "running_task", "time_left"]

REDUCTION_FACTOR = 3.0  # of results of a rung, one goes on to the next, unless the configuration says otherwise
BEGUN = "begun"  # file of a task that a process does; its time is when that began
TAIL = 8192  # bytes at the end of a log that are looked at


@dataclass(frozen=True)
class Level:
    """The tasks of one rung.

    Attributes:
        rung: its number.
        epochs: of finetuning on it; None where the configuration does not say.
        planned: tasks that there will be, should none fail any more.
        finished, failed: those that have ended.
        running: those that are being done.
        waiting: those that were handed out, and wait for a node or a worker.
        interrupted: those that a driver which is gone has handed out, and that are gone on with first.
    """

    rung: int
    epochs: int | None
    planned: int
    finished: int
    failed: int
    running: int = 0
    interrupted: int = 0
    waiting: int = 0

    @property
    def pending(self) -> int:
        """Tasks that have not begun."""
        begun = self.finished + self.failed + self.running + self.interrupted + self.waiting
        return max(self.planned - begun, 0)

    @property
    def rest(self) -> int:
        """Tasks that no process has begun, or does any more."""
        return self.pending + self.waiting + self.interrupted

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, and ``pending``."""
        return {**asdict(self), "pending": self.pending}


def planned(trials: int, rungs: int, reduction_factor: float, failed: Mapping[int, int] | None = None) -> list[int]:
    """Return the number of tasks on every rung that a search comes to.

    Args:
        trials: candidates that were asked for.
        rungs: how many there are.
        reduction_factor: one of so many results of a rung goes on to the next.
        failed: tasks that have failed, by rung: they leave no result that could.
    """
    found = [trials]
    for rung in range(1, rungs):
        results = found[-1] - (failed or {}).get(rung - 1, 0)
        found.append(int(max(results, 0) // reduction_factor))
    return found


def levels(
    search: Mapping[str, Any],
    results: Iterable[Result],
    failures: Iterable[str],
    *,
    running: Iterable[str] = (),
    interrupted: Iterable[str] = (),
    waiting: Iterable[str] = (),
) -> list[Level]:
    """Count a search's tasks on every rung.

    Args:
        search: ``trials``, ``rungs`` and ``reduction_factor`` of the configuration.
        results: of all tasks that have finished.
        failures, running, interrupted, waiting: names of the other tasks, see ``Level``.
    """
    finished = Counter(result.rung for result in results)
    others = (failures, running, interrupted, waiting)
    failed, *begun = (Counter(place_of(unit)[0] for unit in units) for units in others)
    rungs = list(search["rungs"]) or [None]
    whole = planned(search["trials"], len(rungs), search["reduction_factor"], failed)
    found = []
    for rung, (epochs, number) in enumerate(zip(rungs, whole, strict=True)):
        counts = (finished[rung], failed[rung], *(units[rung] for units in begun))
        found.append(Level(rung, epochs, max(number, sum(counts)), *counts))
    return found


def time_left(
    found: Sequence[Level], results: Iterable[Result], running: Mapping[str, float], workers: int
) -> float | None:
    """Return the seconds that the rest of a search takes, from what its tasks took so far, rung by rung.

    A rung without a result takes its epochs' share of what the rung below takes.

    Args:
        found: of ``levels``.
        results: of all tasks that have finished.
        running: seconds that tasks have run, by their names.
        workers: tasks that run side by side.

    Returns:
        That, or None while it cannot be told.
    """
    took: dict[int, list[float]] = {level.rung: [] for level in found}
    for result in results:
        if math.isfinite(result.seconds) and result.rung in took:
            took[result.rung].append(result.seconds)
    each: dict[int, float | None] = {}
    rest = 0.0
    for place, level in enumerate(found):
        own, below = took[level.rung], found[place - 1] if place else None
        each[level.rung] = sum(own) / len(own) if own else None
        if not own and below is not None and below.epochs and level.epochs is not None:
            shorter = each[below.rung]
            each[level.rung] = None if shorter is None else shorter * level.epochs / below.epochs
        seconds = each[level.rung]
        if seconds is None and level.rest + level.running:
            return None
        rest += level.rest * (seconds or 0.0)
    for unit, since in running.items():
        rest += max((each.get(place_of(unit)[0]) or 0.0) - since, 0.0)
    return rest / max(workers, 1)


def running_task(run: Run, unit: str) -> dict[str, Any]:
    """Describe a task that was handed out: whether it waits, since when, and the last epoch that it told of.

    A task waits until its process has begun, and one that is trained by several workers until they have.

    Args:
        run: the run.
        unit: the task's name.

    Returns:
        ``unit``; ``waiting``; ``since``, when it began, or was handed out, in seconds since 1970; ``epoch``, ``epochs``
        and ``loss``; None for what is not known yet.
    """
    folder = run.trial(unit)
    lines = list(events(folder / "metrics.jsonl"))
    epoch: dict[str, Any] = next((line for line in reversed(lines) if line.get("event") == "epoch"), {})
    begun = _modified(folder / BEGUN)
    return {
        "unit": unit,
        "waiting": begun is None or (bool(lines) and lines[-1].get("event") == "waiting"),
        "since": _modified(folder / "spec.json") if begun is None else begun,
        "epoch": epoch.get("epoch"),
        "epochs": epoch.get("epochs"),
        "loss": epoch.get("loss"),
    }


def _modified(path: Path) -> float | None:
    """When a file was written, in seconds since 1970; None where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def events(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the last events of a log; a line that is being written, or damaged, is left out."""
    if not path.is_file():  # reading a pipe would wait for ever
        return
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def progress(run: Run, results: Sequence[Result], failures: Mapping[str, str]) -> dict[str, Any]:
    """Return how far a search is, JSON-ready.

    Args:
        run: the run.
        results, failures: of its tasks.

    Returns:
        ``driver``, the live process that leads the search (``host``, ``pid``), or None; ``requested`` candidates;
        ``tasks``, a ``Level`` per rung; ``handed_out``, a ``running_task`` for each that runs or waits or, where no
        driver lives, was interrupted; ``seconds`` from the first task's begin to now, or to the last result where no
        driver lives; ``worker_seconds`` of all finished tasks; ``seconds_left``, None where it cannot be told.
    """
    table, holder = run.search_table(), Lock.holder(run.leases)
    begun = [running_task(run, task.id) for task in run.unfinished()]
    states: dict[str, list[str]] = {"running": [], "waiting": [], "interrupted": []}
    for task in begun:
        states["interrupted" if holder is None else "waiting" if task["waiting"] else "running"].append(task["unit"])
    found = levels(table, results, failures, **states)
    now, left = time.time(), None
    if holder is not None:
        ran = {task["unit"]: max(now - (task["since"] or now), 0.0) for task in begun if not task["waiting"]}
        left = time_left(found, results, ran, len(ran)) if ran or not states["waiting"] else None
    return {
        "driver": None if holder is None else {"host": holder.host, "pid": holder.pid},
        "requested": table["trials"],
        "tasks": [level.as_dict() for level in found],
        "handed_out": begun,
        "seconds": _span(run, None if holder is None else now),
        "worker_seconds": sum(r.seconds for r in results if math.isfinite(r.seconds)),
        "seconds_left": left,
    }


def _span(run: Run, now: float | None) -> float | None:
    """Seconds from the first task's begin to ``now``, or to the last result; None where neither is known."""
    begun = [path.stat().st_mtime for path in run.path.glob("trials/r0-*/spec.json")]
    ended = [now] if now is not None else [path.stat().st_mtime for path in run.path.glob("trials/*/result.json")]
    return max(max(ended) - min(begun), 0.0) if begun and ended else None
