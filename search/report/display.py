"""Show a search in the terminal while it runs: progress bars, the space, a live table, the front."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from prunesweep.pruners import TrainedMethod, get_method
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.space.space import Range, Space, Summary
from prunesweep.search.store.front import hypervolume, quality_of, values
from prunesweep.search.store.run import Result, failure_reasons, reason_of
from prunesweep.training import EvalMetrics

__all__ = ["Display", "clock", "front_notes", "print_front", "print_promoted"]

BANDS = 5
HEADINGS = {"ppl": "ppl", "top1": "top-1 (%)", "balanced": "balanced (%)", "agreement": "agreement (%)"}  # of qualities
IMBALANCE = 1.0  # percent between top-1 and balanced accuracy from which both are shown
MEASURES = {
    "loss": "loss",
    "kl": "KL to the source",
    "ppl": "perplexity",
    "top1": "top-1",
    "balanced": "balanced accuracy",
    "agreement": "agreement",
}


class Display:
    """Draw on ``console``; if it is not a terminal, print a line per event instead of redrawing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None

    def note(self, text: str) -> None:
        """Print a line of plain text."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def data(self, lines: Sequence[str]) -> None:
        """Print what ``Data.describe`` says of the data."""
        self.note("\n".join(lines))

    @contextlib.contextmanager
    def progress(self) -> Iterator[Any]:
        """Show progress bars for the time of a ``with`` block.

        Yields:
            A function (what is being done, share done in [0, 1], note) that draws one bar for each ``what``.
        """
        columns = (
            TextColumn("{task.description:22}"),
            BarColumn(30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        tasks: dict[str, TaskID] = {}

        def report(what: str, share: float, note: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=1.0, note="")
                if not self.console.is_terminal:
                    self.note(f"{what} ...")
            bars.update(tasks[what], completed=share, note=note)
            if share >= 1 and not self.console.is_terminal:
                self.note(f"{what}: {note}")

        with bars:
            self._live = bars.live
            yield report
        self._live = None

    def space(self, space: Space, summary: Summary, quality: EvalMetrics | None, zero_shot: Range | None) -> None:
        """Show the source, every variable with its range, the objectives over a sample, and what can be reached.

        Args:
            space: the search space.
            summary: the objectives over a sample of the space.
            quality: accuracy or perplexity of the source, if it is known.
            zero_shot: range of accuracies before any finetuning, if it is known.
        """
        source = space.source_cost
        self.note(
            f"source: {space.arch.source}  {'' if quality is None else f'{quality}  '}"
            f"{source.macs / 1e6:.2f} M MACs  {source.params / 1e6:.3f} M params"
        )
        variables = Table("variable", "low", "high", "meaning", title="search space", title_justify="left")
        free = [v for v in space.variables if not v.fixed]
        for v in free:
            if v.choices:
                variables.add_row(v.name, ", ".join(v.choices), "", v.meaning)
            else:
                variables.add_row(v.name, f"{v.low:g}", f"{v.high:g}", v.meaning)
        accuracy = HEADINGS["top1" if quality is None or quality.agreement is None else "agreement"]
        columns = ("objective", "min", "median", "max")
        objectives = Table(*columns, title="over a sample of the space", title_justify="left")
        for name, spread, unit, digits in (
            ("macs (M) ↓", summary.macs, 1e6, 2),
            ("macs / source", summary.macs, source.macs, 3),
            ("params (M)", summary.params, 1e6, 3),
            *([("latency (ms) ↓, predicted", summary.latency_ms, 1, 3)] if summary.latency_ms else []),
            *([(f"{accuracy} ↑, before finetuning, training images", zero_shot, 1, 2)] if zero_shot else []),
        ):
            values = (spread.low, spread.median, spread.high)
            objectives.add_row(name, *(f"{v / unit:.{digits}f}" for v in values))
        self.console.print(Group(variables, objectives))
        low, high = summary.reachable
        table = space.table
        share = "all points" if summary.feasible == 1 else f"{summary.feasible:.0%} of the points"
        self.note(
            f"budget window [{table.budget[0]:g}, {table.budget[1]:g}]: {share} can be built, with {low:.3f} to "
            f"{high:.3f} of the source's MACs; {len(free)} variables, {summary.distinct} distinct candidates in a "
            f"sample of {round(len(summary.points) / summary.feasible)}"
        )

    def plan(self, config: SearchConfig, units: int | None) -> None:
        """Show how much would be trained: tasks and epochs per rung, and how many tasks run side by side.

        Args:
            config: configuration of the search.
            units: number of tasks that run side by side, if it is known.
        """
        search, count = config.search, config.search.trials
        for name, table in config.start.items():
            shares = ", ".join(f"{share:g}" for share in table.budgets)
            runs = 1 if get_method(name, TrainedMethod).several else len(table.budgets)
            self.note(
                f"plan: first, unless the cache has it, {name} decides in {runs} x {table.recipe.epochs} epochs for "
                f"{shares} of the MACs"
            )
        parts, epochs = [], 0
        for rung, own in enumerate(search.rungs or (config.finetune.epochs,)):
            count = search.trials if rung == 0 else int(count // search.reduction_factor)
            epochs += count * own
            parts.append(f"{count} x {own} epochs")
        resources = config.resources
        each = f"{resources.workers_per_trial} worker{'s' if resources.workers_per_trial > 1 else ''}"
        each += f" of {resources.cpus_per_trial} CPUs and {resources.gpus_per_trial:g} GPUs"
        beside = "" if units is None else f"; {units} side by side here"
        self.note(f"plan: {', then '.join(parts)}: {epochs} epochs in all, each on {each}{beside}")

    def failures(self, failures: Mapping[str, str], *, again: bool) -> None:
        """Show how many trials of a run have failed so far, and why, in a line for every distinct reason.

        Args:
            failures: errors by the tasks' names.
            again: whether they are done again.
        """
        if failures:
            count = f"{len(failures)} trial{'s' if len(failures) > 1 else ''} failed before"
            self.note(f"{count}: done again now" if again else f"{count} (--retry-failed does them again):")
            for reason in failure_reasons(failures):
                self.note(f"  {reason}")

    @contextlib.contextmanager
    def live(self, coordinator: Coordinator, source: Mapping[str, Any], window: tuple[float, float]) -> Iterator[Any]:
        """Show the live table for the time of a ``with`` block; it also redraws itself, so that its clock moves.

        Args:
            coordinator: the search.
            source: the source's costs by name, ``macs`` among them.
            window: smallest and largest budget, as shares of the source's MACs.

        Yields:
            A function to call after every change.
        """
        started, before = time.monotonic(), coordinator.settled
        seen, failed = len(coordinator.results), set(coordinator.failures)

        def render() -> RenderableType:
            return live_table(coordinator, source, window, time.monotonic() - started, before)

        def changed() -> None:
            nonlocal seen
            for unit, error in coordinator.failures.items():
                if unit not in failed:
                    failed.add(unit)
                    self.note(f"trial {unit} failed: {reason_of(error)}")
            if not self.console.is_terminal:
                for result in coordinator.results[seen:]:
                    self.note(_line(result, coordinator, source["macs"]))
            seen = len(coordinator.results)

        if not self.console.is_terminal:
            yield changed
            return
        with Live(get_renderable=render, console=self.console, refresh_per_second=2) as self._live:
            yield changed
        self._live = None

    def overhead(self, coordinator: Coordinator, before: int, elapsed: float) -> None:
        """Show what this session's results took: computing and measuring models, training, and all else.

        Args:
            coordinator: the search.
            before: number of results when this session began.
            elapsed: seconds since then.
        """
        found = coordinator.results[before:]
        if not found:
            return
        whole = elapsed * coordinator.max_concurrent  # of the workers
        computing, training = (sum(times) / whole for times in zip(*map(_work, found), strict=True))
        again = f"; {coordinator.duplicates} proposals were candidates already" if coordinator.duplicates else ""
        each = coordinator.seconds / len(found)
        other = max(1 - computing - training, 0)
        self.note(
            f"{len(found)} units in {clock(elapsed)}: of the workers' time {computing:.0%} went into computing and "
            f"measuring models, {training:.0%} into training, {other:.0%} into other things; the driver spent "
            f"{each:.3f} s on each unit, {coordinator.seconds / whole:.1%} of that time{again}"
        )

    def close(self) -> None:
        """Restore the terminal, for a process that ends without running further code."""
        if self._live is not None:
            self._live.stop()

    def front(self, front: Sequence[dict[str, Any]], source_macs: int) -> None:
        """Print the Pareto front.

        Args:
            front: as for ``print_front``.
            source_macs: as for ``print_front``.
        """
        print_front(self.console, front, source_macs)

    def advice(self, lines: Sequence[str]) -> None:
        """Print what the results say about the search's settings, a line each."""
        for line in lines:
            self.note(f"advice: {line}")


def _work(result: Result) -> tuple[float, float]:
    """Seconds of a result's computing and training."""
    return result.computing_seconds, result.training_seconds


def live_table(
    coordinator: Coordinator, source: Mapping[str, Any], window: tuple[float, float], elapsed: float, before: int
) -> RenderableType:
    """Build a table of trials, front, hypervolume, time left, and the best top-1 in every band of the budget window.

    Args:
        coordinator: the search.
        source: the source's costs by name, ``macs`` among them.
        window: smallest and largest budget, as shares of the source's MACs.
        elapsed: seconds since this session began.
        before: number of tasks that had ended by then.
    """
    failed, settled = len(coordinator.failures), coordinator.settled
    quality = quality_of(coordinator.search.objectives)
    quality = "top1" if quality == "ppl" else quality
    results = [r for r in coordinator.current if r.has_model and math.isfinite(getattr(r, quality))]
    eta = elapsed / (settled - before) * (coordinator.expected - settled) if settled > before else None
    state = Table(box=None, show_header=False)
    state.add_row(
        f"[bold]{_rungs(coordinator)}[/] done",
        f"{coordinator.live} running",
        f"{failed} failed",
        f"front {len(coordinator.front)}",
        f"hypervolume {hypervolume(coordinator.best, source, coordinator.search.objectives):.4f}",
        f"{clock(elapsed)} elapsed",
        f"ETA {clock(eta)}" + ("  [yellow]stopping[/]" if coordinator.stopping else ""),
    )
    bands = Table("MACs / source", *(f"{low:.2f}-{high:.2f}" for low, high in _bands(window)), box=None)
    best = [
        max((getattr(r, quality) for r in results if low < r.macs / source["macs"] <= high), default=None)
        for low, high in _bands(window)
    ]
    bands.add_row(f"best {HEADINGS[quality]}", *("-" if b is None else f"{b:.2f}" for b in best))
    return Group(state, bands)


def _bands(window: tuple[float, float]) -> list[tuple[float, float]]:
    """Split the window into equal bands; the first one begins at 0, as coarse units can undershoot it."""
    low, high = window
    edges = [low + (high - low) * i / BANDS for i in range(BANDS + 1)]
    edges[0] = 0.0
    return list(pairwise(edges))


def clock(seconds: float | None) -> str:
    """Format seconds as mm:ss, or as h:mm:ss from an hour on."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def _rungs(coordinator: Coordinator) -> str:
    """Return the number of finished tasks on every rung, and of the candidates that were asked for."""
    counts = Counter(result.rung for result in coordinator.results)
    above = "".join(f" > {counts[rung]}" for rung in range(1, len(coordinator.search.rungs)))
    return f"{counts[0]}/{coordinator.requested}{above}"


def _line(result: Result, coordinator: Coordinator, source_macs: int) -> str:
    varying = {v.name for v in coordinator.space.variables if not v.fixed}
    point = "  ".join(
        f"{k} {v}" if isinstance(v, str) else f"{k} {v:.3g}" for k, v in result.point.items() if k in varying
    )
    rung = f" on rung {result.rung}" if len(coordinator.search.rungs) > 1 else ""
    agreeing = "agreement" in coordinator.search.objectives
    quality = str(result.figures._replace(top1=None) if agreeing else result.figures)  # of agreement, with the KL
    if "balanced" in coordinator.search.objectives:
        quality = f"balanced {result.balanced:.2f} %, {quality}"
    if not agreeing:
        for measure in {"loss", "kl"} & {*coordinator.search.ranking.names(result.epochs)}:
            quality += f", {MEASURES[measure]} {getattr(result, measure):.4g}"
    if not all(map(math.isfinite, values(result, coordinator.search.objectives))):
        quality = "diverged, which counts as worse than all others"
    return (
        f"[{_rungs(coordinator)}] trial {result.trial}{rung}: {quality}  "
        f"MACs {result.macs / source_macs:.3f} of the source  ({point}; {result.seconds:.1f} s)"
    )


def print_promoted(console: Console, found: Sequence[dict[str, Any]], source_macs: int, run: Path) -> None:
    """Print a table of finetuned front members, with the quality that they had in the search, and their folders.

    Args:
        console: where to print.
        found: the contents of their ``promoted.json``.
        source_macs: MACs of the source.
        run: folder of the run.
    """
    table = Table(title="promoted", title_justify="left", box=box.SIMPLE)
    quality = next(name for name in ("ppl", "top1", "agreement") if all(p.get(name) is not None for p in found))
    for name in ("unit", HEADINGS[quality], "in the search", "/ source", "params (M)", "latency (ms)", "recipe"):
        table.add_column(name, justify="right")
    for p in found:
        latency = p["latency"]
        table.add_row(
            p["unit"],
            *(f"{p[name]:.2f}" for name in (quality, f"searched_{quality}")),
            f"{p['macs'] / source_macs:.3f}",
            f"{p['params'] / 1e6:.3f}",
            "" if latency is None else f"{latency['median_ms']:.3f} (batch {latency['batch']})",
            p["recipe"],
        )
    console.print(table)
    _print_folders(console, [(p["unit"], str(run / p["model"])) for p in found])


def print_front(console: Console, front: Sequence[dict[str, Any]], source_macs: int) -> None:
    """Print a table of the Pareto front, one row per model, and the folders of the models.

    Args:
        console: where to print.
        front: the contents of ``front.json``.
        source_macs: MACs of the source.
    """
    table = Table(title="Pareto front", title_justify="left", box=box.SIMPLE, padding=0)
    columns: dict[str, Callable[[Any], str]] = {
        **{name: lambda p, name=name: str(p[name]) for name in ("trial", "rung", "epochs")},  # type: ignore[misc]
        "ppl": lambda p: f"{p['ppl']:.2f}",
        "top-1\n(%)": lambda p: f"{p['top1']:.2f}",
        "balanced\n(%)": lambda p: f"{p['balanced']:.2f}" if abs(p["balanced"] - p["top1"]) >= IMBALANCE else "",
        "95 %\ninterval": _between,
        "test\n(%)": lambda p: f"{p['test_top1' if 'test_top1' in p else 'test_agreement']:.2f}",
        "loss": lambda p: f"{p['loss']:.4f}",
        "KL": lambda p: f"{p['kl']:.4f}",
        "agree\n(%)": lambda p: f"{p['agreement']:.2f}",
        "MACs\n(M)": lambda p: f"{p['macs'] / 1e6:.2f}",
        "/\nsource": lambda p: f"{p['macs'] / source_macs:.3f}",
        "params\n(M)": lambda p: f"{p['params'] / 1e6:.3f}",
        "latency\n(ms),\npredicted": lambda p: f"{p['latency_ms']:.3f}",
    }
    if any("latency_ms" in point or "test" in point for point in front):
        del columns["agree\n(%)"]  # eighty columns have no room for both
    rows = {name: [_cell(point, cell) for point in front] for name, cell in columns.items()}
    shown = {name: cells for name, cells in rows.items() if any(cells)}  # runs of earlier versions have fewer figures
    for name in shown:
        table.add_column(name, justify="right")
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    console.print(table)
    for line in front_notes(front):
        console.print(line, highlight=False, soft_wrap=True)
    _print_folders(console, [(f"trial {point['trial']}", point["model"]) for point in front])


def front_notes(front: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of which images the figures of a front are, and by what its members were chosen.

    Args:
        front: as for ``print_front``.

    Returns:
        A line for people for every kind of members; none for runs of versions that did not keep it.
    """
    lines = []
    for point in front:
        if "images" not in point or "split" not in point:
            continue
        ranked, images = f"compared by {MEASURES[point['ranked_by']]}", f"{point['images']:,}"
        if point["split"] == "search":
            line = (
                f"figures of {images} images held out of the training split, on which candidates are {ranked}: they "
                "flatter; the end of a search, and 'prunesweep eval RUN', measure the validation split"
            )
        elif "searched_images" in point:
            line = (
                f"figures of {images} validation images, by which nothing was chosen; candidates were {ranked} on "
                f"{point['searched_images']:,} images held out of the training split"
            )
        else:
            line = f"figures of {images} validation images; candidates were {ranked} on them, so they flatter"
        lines.append(line)
        if "test" in point:
            lines.append(f"tested on {point['test_images']:,} images of {point['test']}")
    return list(dict.fromkeys(lines))


def _between(point: Mapping[str, Any]) -> str:
    name = "top1" if "top1" in point else "agreement"
    return f"{point[f'{name}_low']:.1f}-{point[f'{name}_high']:.1f}"


def _cell(point: Mapping[str, Any], cell: Callable[[Any], str]) -> str:
    """A cell of a row; empty where the point lacks the figure."""
    try:
        return cell(point)
    except KeyError:
        return ""


def _print_folders(console: Console, folders: Sequence[tuple[str, str]]) -> None:
    """Print a line per folder, below a table and not in it: one that is wrapped in a column cannot be copied."""
    for name, folder in folders:
        console.print(f"{name}: {folder}", highlight=False, markup=False, soft_wrap=True)
