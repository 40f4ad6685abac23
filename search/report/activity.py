"""What a run is doing: tasks that run, what has failed and why, and how its front grew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from prunesweep.models.io.lock import Lock
from prunesweep.search.store.front import Ranking, hypervolume, latest
from prunesweep.search.store.run import Result, Run, reason_of

__all__ = ["activity", "growth", "own_epochs"]

STEPS = 80  # of the curve of the hypervolume, at most
TAIL = 8192  # bytes at the end of a log that are looked at


def activity(run: Run, results: Sequence[Result], failures: Mapping[str, str]) -> dict[str, Any]:
    """Return whether a driver lives, tasks that it has handed out, and failures with the line that says why.

    Args:
        run: the run.
        results: of all tasks.
        failures: errors by the tasks' names.
    """
    table, holder = run.search_table(), Lock.holder(run.leases)
    rungs = max(len(table["rungs"]), 1)
    finished = [sum(r.rung == rung for r in results) for rung in range(rungs)]
    failed = sum(unit.startswith("r0-") for unit in failures)
    begun = [_running(run, task.id) for task in run.unfinished()]
    waiting = sum(task["unit"].startswith("r0-") for task in begun)
    return {
        "driver": None if holder is None else {"host": holder.host, "pid": holder.pid},
        "requested": table["trials"],
        "finished": finished,
        "failed": len(failures),
        "pending": max(table["trials"] - finished[0] - failed - waiting, 0),
        "running": begun,
        "failures": [[unit, reason_of(error)] for unit, error in sorted(failures.items())],
    }


def _running(run: Run, unit: str) -> dict[str, Any]:
    """A task that was handed out: since when, and the last epoch that it told of."""
    folder = run.trial(unit)
    lines = list(_events(folder / "metrics.jsonl"))
    epoch: dict[str, Any] = next((line for line in reversed(lines) if line.get("event") == "epoch"), {})
    try:
        since = (folder / "spec.json").stat().st_mtime
    except OSError:
        since = None
    return {
        "unit": unit,
        "since": since,
        "epoch": epoch.get("epoch"),
        "epochs": epoch.get("epochs"),
        "loss": epoch.get("loss"),
    }


def _events(path: Path) -> Iterable[dict[str, Any]]:
    """The last events of a log; a line that is being written, or damaged, is left out."""
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


def ended(run: Run, result: Result) -> float:
    """When a task ended, in seconds since 1970: as its log says, else as its result's file is dated."""
    last = [line["time"] for line in _events(run.trial(result.id) / "metrics.jsonl") if "time" in line][-1:]
    try:
        return float(last[0]) if last else (run.trial(result.id) / "result.json").stat().st_mtime
    except (OSError, TypeError, ValueError):
        return 0.0


def own_epochs(results: Sequence[Result]) -> dict[str, int]:
    """Return the epochs that every task trained, by its name; ``Result.epochs`` has those of the rungs below too."""
    known = {(r.trial, r.rung): r.epochs for r in results}
    return {r.id: r.epochs - known.get((r.trial, r.rung - 1), 0) for r in results}


def growth(run: Run, results: Sequence[Result], ranking: Ranking, source: Mapping[str, Any]) -> list[list[float]]:
    """Return how the front grew, as rows of (epochs trained so far, seconds since the first task began, hypervolume).

    Args:
        run: the run.
        results: of all tasks.
        ranking: what candidates are compared by.
        source: the source's costs and figures, those of the images by which candidates are compared.
    """
    ends = {r.id: ended(run, r) for r in results}
    order = sorted(results, key=lambda r: (ends[r.id], r.rung, r.trial))
    if not order:
        return []
    epochs, begun = own_epochs(results), min(ends[r.id] - r.seconds for r in order)
    spent = list(accumulate(epochs[r.id] for r in order))
    count = min(len(order), STEPS)
    places = sorted({round((i + 1) * len(order) / count) for i in range(count)})
    rows = []
    for place in places:
        best = ranking.front(r for r in latest(order[:place]) if r.has_model)
        found = hypervolume(best, source, ranking.objectives)
        rows.append([spent[place - 1], round(ends[order[place - 1].id] - begun, 3), found])
    return rows
