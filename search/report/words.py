"""Words for how far a search is: in the terminal, and what `prunesweep status` prints. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prunesweep.search.store.front import corner
from prunesweep.search.store.progress import Level
from prunesweep.search.store.records import place_of
from prunesweep.training.metrics import EvalMetrics, quality_name

__all__ = [
    "COST_NAMES",
    "HEADINGS",
    "MEASURES",
    "clock",
    "counted",
    "counts",
    "front_line",
    "named",
    "status_lines",
    "task_line",
]

HEADINGS = {"ppl": "ppl", "top1": "top-1 (%)", "balanced": "balanced (%)", "agreement": "agreement (%)"}  # of qualities
COST_NAMES = {"macs": "MACs", "params": "params", "latency_ms": "latency"}
MEASURES = {
    "loss": "loss",
    "kl": "KL to the source",
    "ppl": "perplexity",
    "top1": "top-1",
    "balanced": "balanced accuracy",
    "agreement": "agreement",
}


def named(name: str, words: Mapping[str, str], measure: str | None) -> str:
    """Say what a figure is called.

    Args:
        name: of an objective, or of what candidates are compared by.
        words: ``HEADINGS`` or ``MEASURES``.
        measure: the search's own measure of quality (``search.quality``), if it has one.
    """
    return words[name] if name in words else quality_name(str(measure))


def clock(seconds: float | None) -> str:
    """Format seconds as mm:ss, or as h:mm:ss from an hour on."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def counted(number: float, what: str) -> str:
    """Return a number and the word for what it counts: ``1 epoch``, ``3 epochs``."""
    shown = f"{number}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {what}{'' if number == 1 else 's'}"


def counts(level: Level, several: bool) -> str:
    """Say how many tasks of a rung have finished, of how many; ``several``: there are other rungs."""
    return f"rung {level.rung}: {level.finished}/{level.planned}" if several else f"{level.finished}/{level.planned}"


def task_line(task: Mapping[str, Any], several: bool, now: float | None) -> str:
    """Name a task, with its epoch, its loss, and for how long it has run.

    Args:
        task: as of ``running_task``.
        several: there are several rungs.
        now: seconds since 1970; None for one that was interrupted.
    """
    rung, number = place_of(task["unit"])
    parts = [f"trial {number} on rung {rung}" if several else f"trial {number}"]
    if task["epoch"] is not None:
        parts.append(f"epoch {task['epoch']} of {task['epochs']}")
        if isinstance(task["loss"], float):
            parts.append(f"loss {task['loss']:.4g}")
    if now is None:
        parts.append("interrupted")
    elif task.get("waiting"):
        since = "" if task["since"] is None else f" for {clock(max(now - task['since'], 0.0))}"
        parts.append(f"waiting for a worker{since}")
    elif task["since"] is not None:
        parts.append(clock(max(now - task["since"], 0.0)))
    return ", ".join(parts)


def front_line(members: int, share: float, objectives: Sequence[str]) -> str:
    """Say how large a front is, and its hypervolume with its reference point."""
    models = "1 model" if members == 1 else f"{members} models"
    return f"front of {models}, hypervolume {share:.4f} from {corner(objectives)}"


def status_lines(found: Mapping[str, Any], run: str, now: float) -> Iterator[str]:
    """Yield what `prunesweep status` prints.

    Args:
        found: of ``Run.status``, maybe of another machine's earlier version, which lacks how far each rung is.
        run: the run's folder or name.
        now: seconds since 1970.
    """
    trials, tasks = found["trials"], found.get("tasks", ())
    if tasks:
        yield _doing(found, run)
    state = f"{trials['finished']} of {found['requested']} trials finished, {trials['running']} running, "
    waiting = sum(level.get("waiting", 0) for level in tasks)
    of_them = f" ({waiting} of them waiting for a worker)" if waiting else ""
    yield f"{state}{trials['pending']} pending{of_them}, {trials['failed']} failed"
    if len(tasks) > 1:
        for level in tasks:
            epochs = "1 epoch" if level["epochs"] == 1 else f"{level['epochs'] or 0} epochs"
            parts = [f"{level['finished']} of {level['planned']} finished"]
            parts += [
                f"{level[name]} {name}"
                for name in ("running", "waiting", "interrupted", "pending", "failed")
                if level.get(name)
            ]
            yield f"  rung {level['rung']} ({epochs}): {', '.join(parts)}"
    for task in found.get("handed_out", ()):
        yield f"  {task_line(task, len(tasks) > 1, now if found['driver'] else None)}"
    hypervolume = f"hypervolume {found['hypervolume']:.4f}"
    yield hypervolume + (f" from {corner(found['objectives'])}" if "objectives" in found else "")
    source = found["source"]
    figures = EvalMetrics.of(source).told(found.get("measure"))
    yield f"source: {figures}, {source['macs']:,} MACs, {source['params']:,} params"
    for line in found.get("advice", ()):
        yield f"advice: {line}"


def _doing(found: Mapping[str, Any], run: str) -> str:
    """Whether a driver lives, the time so far, and the time that is left."""
    spent = ""
    if found["seconds"] is not None:
        spent = f"; {clock(found['seconds'])} since the first trial began, {clock(found['worker_seconds'])} of work"
    if found["driver"]:
        where = f"process {found['driver']['pid']} on {found['driver']['host']}"
        left = "" if found["seconds_left"] is None else f", about {clock(found['seconds_left'])} left"
        return f"{run}: searching, {where}{spent}{left}"
    if any(level["pending"] + level["interrupted"] for level in found["tasks"]):
        return f"{run}: no search is running, go on with: prunesweep resume {run}{spent}"
    return f"{run}: ended{spent}"
