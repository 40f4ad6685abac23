"""What a run is doing: tasks that run, what has failed and why, and how its front grew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from prunesweep.search.store.front import Ranking, hypervolume, latest
from prunesweep.search.store.progress import events, progress
from prunesweep.search.store.run import Result, Run, reason_of

__all__ = ["activity", "growth", "own_epochs"]

STEPS = 80  # of the curve of the hypervolume, at most


def activity(run: Run, results: Sequence[Result], failures: Mapping[str, str]) -> dict[str, Any]:
    """Return how far the search is (``progress``), and failures with the line that says why.

    Args:
        run: the run.
        results: of all tasks.
        failures: errors by the tasks' names.
    """
    return {
        **progress(run, results, failures),
        "failures": [[unit, reason_of(error)] for unit, error in sorted(failures.items())],
    }


def ended(run: Run, result: Result) -> float:
    """When a task ended, in seconds since 1970: as its log says, else as its result's file is dated."""
    last = [line["time"] for line in events(run.trial(result.id) / "metrics.jsonl") if "time" in line][-1:]
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
