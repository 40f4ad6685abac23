"""Show a search in the terminal while it runs: progress bars, the space, a live table, the front."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from prunesweep.models.io.threads import beside
from prunesweep.pruners import TrainedMethod, get_method
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.space.space import Range, Space, Summary
from prunesweep.search.store.front import COSTS, TWO
from prunesweep.search.store.progress import planned
from prunesweep.search.store.run import Result, failure_reasons, reason_of
from prunesweep.training.metrics import EvalMetrics, quality_name

from .live import live_view, result_line, state_line
from .words import COST_NAMES, HEADINGS, MEASURES, clock, counted

__all__ = ["Display", "clock", "front_notes", "print_front", "print_promoted"]

LEAST = ("agree\n(%)", "balanced\n(%)", "epochs", "loss", "KL", "MACs\n(M)", "rung")  # of columns, the first to go
IMBALANCE = 1.0  # percent between top-1 and balanced accuracy from which both are shown
SILENCE = 30.0  # seconds after which work that goes on says so where there is no terminal
PART = 0.05  # of the time so far, the longest silence of work that takes very long


class Display:
    """Draw on ``console``; if it is not a terminal, print a line per event instead of redrawing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._said = time.monotonic()  # when the last line was printed

    def note(self, text: str) -> None:
        """Print a line of plain text."""
        self._said = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def working(self, what: str) -> AbstractContextManager[None]:
        """Say now and then that something goes on, where there is no terminal, for the time of a ``with`` block.

        Args:
            what: is being done.
        """
        return self._heard(lambda elapsed: f"{what}: {clock(elapsed)} elapsed")

    @contextlib.contextmanager
    def _heard(self, say: Callable[[float], str]) -> Iterator[None]:
        """Where there is no terminal, print a line whenever none came for half a minute, for the time of a block.

        Of work that takes hours the pauses are a twentieth of the time so far.

        Args:
            say: the line, or nothing, from the seconds since the block began.
        """
        if self.console.is_terminal or self.console.quiet:
            yield
            return
        begun = time.monotonic()

        def silent() -> float:  # seconds until it has been for too long
            now = time.monotonic()
            return self._said + max(SILENCE, PART * (now - begun)) - now

        def speak(over: threading.Event) -> None:
            while not over.wait(max(silent(), 0.0)):
                if silent() <= 0:
                    line = say(time.monotonic() - begun)
                    self._said = time.monotonic()
                    if line:
                        self.note(line)

        self._said = begun
        with beside(speak, "progress"):
            yield

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
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        tasks: dict[str, TaskID] = {}
        latest: tuple[str, float, str, float] | None = None  # what, share, note, when it began

        def report(what: str, share: float, note: str) -> None:
            nonlocal latest
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=1.0, note="")
                latest = (what, share, note, time.monotonic())
                if not self.console.is_terminal and share < 1:
                    self.note(f"{what} ...")
            bars.update(tasks[what], completed=share, note=note)
            latest = (what, share, note, latest[3] if latest and latest[0] == what else time.monotonic())
            if share >= 1 and not self.console.is_terminal:
                self.note(f"{what}: {note}")

        def still(elapsed: float) -> str:
            if latest is None:
                return f"preparing: {clock(elapsed)} elapsed"
            what, share, note, begun = latest
            if share >= 1:
                return f"after {what}: {clock(elapsed)} elapsed"
            took = time.monotonic() - begun
            left = f", ETA {clock(took / share * (1 - share))}" if share > 0 else ""
            return f"{what}: {share:.0%}, {clock(took)} elapsed{left}{f'  {note}' if note else ''}"

        with bars, self._heard(still):
            self._live = bars.live
            yield report
        self._live = None

    def space(
        self,
        space: Space,
        summary: Summary,
        quality: EvalMetrics | None,
        zero_shot: Range | None,
        objectives: Sequence[str] = TWO,
        measure: str | None = None,
    ) -> None:
        """Show the source, every variable with its range, the objectives over a sample, and what can be reached.

        Args:
            space: the search space.
            summary: the objectives over a sample of the space.
            quality: accuracy or perplexity of the source, if it is known.
            zero_shot: range of accuracies before any finetuning, if it is known.
            objectives: of the search, which are marked.
            measure: the search's own measure, as ``search.quality`` has it.
        """
        source, own = space.source_cost, None if measure is None else quality_name(measure)
        told = "" if quality is None else f"{quality.brief(own)}  "
        self.note(
            f"source: {space.arch.source}  {told}{source.macs / 1e6:.2f} M MACs  {source.params / 1e6:.3f} M params"
        )
        variables = Table("variable", "low", "high", "meaning", title="search space", title_justify="left")
        free = [v for v in space.variables if not v.fixed]
        for v in free:
            if v.choices:
                variables.add_row(v.name, ", ".join(v.choices), "", v.meaning)
            else:
                variables.add_row(v.name, f"{v.low:g}", f"{v.high:g}", v.meaning)
        accuracy = HEADINGS["top1" if quality is None or quality.agreement is None else "agreement"]
        accuracy = own or accuracy
        better = "↓" if "error" in objectives else "↑"
        columns = ("", "min", "median", "max")
        title = "over a sample of the space; arrows: objectives"
        sample = Table(*columns, title=title, title_justify="left")
        less = {name: " ↓" if name in objectives else "" for name in COSTS}
        rows: list[tuple[str, Range, float, int]] = [
            (f"MACs (M){less['macs']}", summary.macs, 1e6, 2),
            ("MACs / source", summary.macs, source.macs, 3),
            (f"params (M){less['params']}", summary.params, 1e6, 3),
        ]
        if summary.latency_ms:
            rows.append((f"latency (ms){less['latency_ms']}, predicted", summary.latency_ms, 1, 3))
        if zero_shot:
            rows.append((f"{accuracy} {better}, before finetuning, training images", zero_shot, 1, 2))
        for name, spread, unit, digits in rows:
            values = (spread.low, spread.median, spread.high)
            sample.add_row(name, *(f"{v / unit:.{digits}f}" for v in values))
        self.console.print(Group(variables, sample))
        low, high = summary.reachable
        table = space.table
        share = "all points" if summary.feasible == 1 else f"{summary.feasible:.0%} of the points"
        self.note(
            f"budget window [{table.budget[0]:g}, {table.budget[1]:g}]: {share} can be built, with {low:.3f} to "
            f"{high:.3f} of the source's MACs; {counted(len(free), 'variable')}, {summary.distinct} distinct "
            f"candidates in a sample of {round(len(summary.points) / summary.feasible)}"
        )

    def plan(self, config: SearchConfig, units: int | None) -> None:
        """Show how much would be trained: tasks and epochs per rung, and how many tasks run side by side.

        Args:
            config: configuration of the search.
            units: number of tasks that run side by side, if it is known.
        """
        search = config.search
        for name, table in config.start.items():
            shares = ", ".join(f"{share:g}" for share in table.budgets)
            runs = 1 if get_method(name, TrainedMethod).several else len(table.budgets)
            self.note(
                f"plan: first, unless the cache has it, {name} decides in {runs} x {table.recipe.epochs} epochs for "
                f"{shares} of the MACs"
            )
        rungs = search.rungs or (config.finetune.epochs,)
        whole = planned(search.trials, len(rungs), search.reduction_factor)
        epochs = sum(count * own for count, own in zip(whole, rungs, strict=True))
        parts = []
        for rung, (count, own) in enumerate(zip(whole, rungs, strict=True)):
            candidates = f"the best {count}" if rung else counted(count, "candidate")
            parts.append(f"{candidates} for {counted(own, 'epoch')}" if own else f"{candidates} untrained")
        several = f"{len(rungs)} rungs: " if len(rungs) > 1 else ""
        resources = config.resources
        workers, cpus, gpus = resources.workers_per_trial, resources.cpus_per_trial, resources.gpus_per_trial
        each = f"{workers} worker{'s' if workers > 1 else ''} of {cpus} CPU{'s' if cpus > 1 else ''}"
        each += f" and {counted(gpus, 'GPU')}" if gpus else ""
        beside = "" if units is None else f"; {units} side by side here"
        trained = f"{counted(epochs, 'epoch')} in all"
        self.note(f"plan: {several}{', then '.join(parts)}; {trained}, each candidate on {each}{beside}")

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
        started, seen, failed = time.monotonic(), len(coordinator.results), set(coordinator.failures)

        def render() -> RenderableType:
            return live_view(coordinator, source, window, time.monotonic() - started)

        def changed() -> None:
            nonlocal seen
            for unit, error in coordinator.failures.items():
                if unit not in failed:
                    failed.add(unit)
                    self.note(f"trial {unit} failed: {reason_of(error)}")
            for result in coordinator.results[seen:]:
                self.note(result_line(result, coordinator, source))
            seen = len(coordinator.results)

        if not self.console.is_terminal:
            with self._heard(lambda elapsed: state_line(coordinator, elapsed)):
                yield changed
            return
        with Live(get_renderable=render, console=self.console, refresh_per_second=2) as self._live:
            yield changed
        self._live = None

    def overhead(self, coordinator: Coordinator, before: int, elapsed: float, whole: float) -> None:
        """Show what this session's results took: computing and measuring models, training, and all else.

        Args:
            coordinator: the search.
            before: number of results when this session began.
            elapsed: seconds since then.
            whole: seconds of all places for units together.
        """
        found = coordinator.results[before:]
        if not found or not whole:
            return
        computing, training = (sum(times) / whole for times in zip(*map(_work, found), strict=True))
        known = coordinator.duplicates
        again = f"; of the proposals, {known:,} were candidates already" if known else ""
        each = coordinator.seconds / len(found)
        other = max(1 - computing - training, 0)
        self.note(
            f"{counted(len(found), 'unit')} in {clock(elapsed)}: of the workers' time {computing:.0%} went into "
            f"computing and measuring models, {training:.0%} into training, {other:.0%} into other things; the driver "
            f"spent {each:.3f} s on each unit, {coordinator.seconds / whole:.1%} of that time{again}"
        )

    def close(self) -> None:
        """Restore the terminal, for a process that ends without running further code."""
        if self._live is not None:
            self._live.stop()

    def front(self, front: Sequence[dict[str, Any]], source_cost: float, cost: str = "macs") -> None:
        """Print the Pareto front.

        Args:
            front: as for ``print_front``.
            source_cost: as for ``print_front``.
            cost: as for ``print_front``.
        """
        print_front(self.console, front, source_cost, cost)

    def advice(self, lines: Sequence[str]) -> None:
        """Print what the results say about the search's settings, a line each."""
        for line in lines:
            self.note(f"advice: {line}")


def _work(result: Result) -> tuple[float, float]:
    """Seconds of a result's computing and training."""
    return result.computing_seconds, result.training_seconds


def print_promoted(
    console: Console,
    found: Sequence[dict[str, Any]],
    source_cost: float,
    measure: str | None = None,
    cost: str = "macs",
) -> None:
    """Print a table of finetuned front members, with the quality that they had before, and their folders.

    Args:
        console: where to print.
        found: the contents of their ``promoted.json``, with ``model`` as it is to be shown.
        source_cost: the source's ``cost``, of which shares are shown.
        measure: the name of the search's own measure, if it has one.
        cost: the search's first cost.
    """
    table = Table(title="promoted", title_justify="left", box=box.SIMPLE)
    known = ("quality", "error", "ppl", "top1", "agreement")
    quality = next(name for name in known if all(p.get(name) is not None for p in found))
    heading = HEADINGS.get(quality) or str(measure)
    for name in ("unit", heading, "before", f"{COST_NAMES[cost]} / source", "params (M)", "latency (ms)", "recipe"):
        table.add_column(name, justify="right")
    for p in found:
        latency = p["latency"]
        table.add_row(
            p["unit"],
            *(f"{p[name]:.2f}" for name in (quality, f"searched_{quality}")),
            _cell(p, lambda p: f"{p[cost] / source_cost:.3f}"),
            f"{p['params'] / 1e6:.3f}",
            "" if latency is None else f"{latency['median_ms']:.3f} (batch {latency['batch']})",
            p["recipe"],
        )
    console.print(table)
    _print_folders(console, [(p["unit"], p["model"]) for p in found])


def print_front(console: Console, front: Sequence[dict[str, Any]], source_cost: float, cost: str = "macs") -> None:
    """Print a table of the Pareto front, one row per model, and the folders of the models.

    Args:
        console: where to print.
        front: the contents of ``front.json``.
        source_cost: the source's ``cost``, of which shares are shown.
        cost: the search's first cost; the column of shares is behind that of the cost itself.
    """
    table = Table(title="Pareto front", title_justify="left", box=box.SIMPLE, padding=0)
    columns: dict[str, Callable[[Any], str]] = {
        **{name: lambda p, name=name: str(p[name]) for name in ("trial", "rung", "epochs")},  # type: ignore[misc]
        _measure(front): lambda p: f"{p['quality' if 'quality' in p else 'error']:.4g}",
        "ppl": lambda p: f"{p['ppl']:.2f}",
        "top-1\n(%)": lambda p: f"{p['top1']:.2f}",
        "balanced\n(%)": lambda p: f"{p['balanced']:.2f}" if abs(p["balanced"] - p["top1"]) >= IMBALANCE else "",
        "95 %\ninterval": _between,
        "test\n(%)": lambda p: f"{p['test_top1' if 'test_top1' in p else 'test_agreement']:.2f}",
        "loss": lambda p: f"{p['loss']:.4f}",
        "KL": lambda p: f"{p['kl']:.4f}",
        "agree\n(%)": lambda p: f"{p['agreement']:.2f}",
        "MACs\n(M)": lambda p: f"{p['macs'] / 1e6:.2f}",
        "params\n(M)": lambda p: f"{p['params'] / 1e6:.3f}",
        "latency\n(ms),\npredicted": lambda p: f"{p['latency_ms']:.3f}",
    }
    share: dict[str, Callable[[Any], str]] = {"/\nsource": lambda p: f"{p[cost] / source_cost:.3f}"}
    behind = 1 + [name.split("\n")[0] for name in columns].index(COST_NAMES[cost])
    columns = dict([*list(columns.items())[:behind], *share.items(), *list(columns.items())[behind:]])
    rows = {name: [_cell(point, cell) for point in front] for name, cell in columns.items()}
    shown = {name: cells for name, cells in rows.items() if any(cells)}  # runs of earlier versions have fewer figures
    left_out = []
    for name in LEAST:  # a figure that is cut off is worse than one that is not there
        if sum(_width(name, cells) + 1 for name, cells in shown.items()) >= console.width and name in shown:
            left_out.append(name.replace("\n", " "))
            del shown[name]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    console.print(table)
    if left_out:
        line = f"no room for {', '.join(left_out)}: in a wider terminal, or with --csv or --json"
        console.print(line, highlight=False, soft_wrap=True)
    for line in front_notes(front):
        console.print(line, highlight=False, soft_wrap=True)
    _print_folders(console, [(f"trial {point['trial']}", point["model"]) for point in front])


def _measure(front: Sequence[Mapping[str, Any]]) -> str:
    """The heading of the search's own measure, as narrow as its name allows."""
    return next((str(point["measure"]) for point in front if "measure" in point), "").replace(" ", "\n")


def _width(heading: str, cells: Sequence[str]) -> int:
    return max(map(len, (*heading.split("\n"), *cells)))


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
        ranked, images = (
            f"compared by {MEASURES.get(point['ranked_by']) or point.get('measure')}",
            f"{point['images']:,}",
        )
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
