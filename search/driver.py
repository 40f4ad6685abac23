"""A search from its configuration to its front, and the same again after it was interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from tensorboardX import SummaryWriter

from models import Arch, UserError, cut, read_arch
from models.files import publish_folder, write_text
from models.recalibrate import recalibrate
from training import EVAL_BATCH, Quality, evaluate

from .config import SearchConfig, SourceTable, load_config
from .coordinator import Coordinator
from .display import Display
from .front import hypervolume, pareto_front
from .provenance import versions
from .report import write_report
from .run import Lease, Run
from .runtime import RayConnection, execute, slots
from .source import Prepared, prepare
from .space import Params, Space, Spread, Summary, read_scores
from .study import Study

__all__ = ["RAY_DIED", "SearchResult", "resume_search", "run_search"]

SAMPLE = 256  # points of the space whose cost is shown before the search
SCORED = 16  # of them, those that are also cut and evaluated without training
RAY_DIED = 3  # exit code


@dataclass(frozen=True)
class SearchResult:
    """Where a search stands: its folder, its Pareto set (``Run.front``), and whether all trials are done."""

    path: Path
    front: list[dict[str, Any]]
    finished: bool


def run_search(
    config: SearchConfig | str | Path,
    out: str | Path | None = None,
    *,
    console: Console | None = None,
    address: str | None = None,
    dry_run: bool = False,
    verbose: bool = False,
) -> SearchResult | None:
    """Run a search and return its front.

    Args:
        config: the configuration, or the path of a TOML file.
        out: the run's folder, which must not exist yet; ``runs/NAME`` by default.
        console: where to draw; nothing is drawn by default.
        address: of a running Ray cluster, all of whose nodes see ``out``; a Ray of its own by default.
        dry_run: stop, and return None, after the space was shown. Where data or weights are not there, that is said,
            and the space is what the architecture alone can tell.
        verbose: show Ray's own log lines.

    Raises:
        UserError: the configuration, the data or the source cannot be used; nothing is created.
        SearchFailed: too many trials failed.
    """
    if not isinstance(config, SearchConfig):
        config = load_config(config)
    display = Display(console or Console(quiet=True))
    run = Run(out if out is not None else Path("runs") / config.name)
    if run.path.exists():
        raise UserError(
            f"{run.path} exists: go on with 'prunesweep resume {run.path}', or choose another folder with --out"
        )
    if address is None and not dry_run:
        slots(config.resources)
    try:
        if dry_run:
            _check_downloaded(config.source)
        with display.progress() as progress:
            prepared = prepare(config, run.path.parent / "cache", progress)
    except UserError as error:
        if not dry_run:
            raise
        _plan_without(config, error, display)
        return None
    summary = prepared.space.summarise(SAMPLE, config.seed)
    display.space(prepared.space, summary, Quality(prepared.top1, prepared.ppl), _zero_shot(prepared, summary))
    if dry_run:
        display.plan(config, _slots_here(config))
        return None
    create_run(run, config, prepared)
    return _search(run, config, prepared.space, display, address=address, verbose=verbose)


HARMLESS = (
    "search.trials",
    "resources.",
    "cluster.",
    "data.loader_workers",
)  # keys that change no candidate and no figure


def resume_search(
    path: str | Path,
    *,
    trials: int | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> SearchResult:
    """Go on with a search that was stopped or killed; unfinished trials first, from their last epoch.

    Args:
        path: the run's folder.
        trials: a new number of trials; what the run was made with by default.
        overrides: ``key.path=value`` for other keys that change neither a candidate nor a figure (``HARMLESS``).
        console: where to draw; nothing is drawn by default.
        address: of a running Ray cluster; a Ray of its own by default.
        verbose: show Ray's own log lines.

    Raises:
        UserError: ``path`` is no run, another process is working on it, or an override would change the search.
        SearchFailed: too many trials failed.
    """
    run = Run.existing(path)
    made = load_config(run / "search.toml")
    config = load_config(run / "search.toml", [*overrides, *([] if trials is None else [f"search.trials={trials}"])])
    _check_same_search(run, made, config)
    if address is None:
        slots(config.resources)
    space = Space(config.space, read_arch(run / "source"), read_scores(run / "scores", run.facts()["scores"]))
    return _search(run, config, space, Display(console or Console(quiet=True)), address=address, verbose=verbose)


def _check_same_search(run: Run, made: SearchConfig, wanted: SearchConfig) -> None:
    before, after = (dict(_leaves(config.model_dump(mode="json"))) for config in (made, wanted))
    changed = [key for key in before | after if before.get(key) != after.get(key) and not key.startswith(HARMLESS)]
    if changed:
        lines = "\n".join(f"  {key}: {before.get(key)!r}, now {after.get(key)!r}" for key in changed)
        raise UserError(
            f"{run.path} was made with other settings, so its results would not compare:\n{lines}\n"
            "start a new search (search.start_from takes over this one's front), or leave these keys as they are"
        )


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _start_points(config: SearchConfig, space: Space) -> list[Params]:
    """What the user wants to begin with. Raises UserError for a point that is not in the space."""
    points: list[Params] = list(config.search.start)
    if config.search.start_from is not None:
        other = Run.existing(config.search.start_from)
        by_unit = {(r.trial, r.rung): r for r in other.results()}
        points += [by_unit[p["trial"], p["rung"]].point for p in other.front()]
    for i, point in enumerate(points):
        try:
            space.complete(point)
        except UserError as error:
            where = "search.start" if i < len(config.search.start) else f"search.start_from {config.search.start_from}"
            raise UserError(f"{where}: {error}") from error
    return points


def _check_downloaded(source: SourceTable) -> None:
    """Raise UserError for weights from the hub that this machine does not have yet: a dry run fetches nothing."""
    cfg = timm.get_pretrained_cfg(source.model, allow_unregistered=False) if source.pretrained else None
    if cfg is None or not cfg.hf_hub_id:
        return
    repo = cfg.hf_hub_id + (source.model if cfg.hf_hub_id.endswith("/") else "")
    files = ("model.safetensors", "pytorch_model.bin")
    if not any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        raise UserError(f"the weights {repo} are not on this machine yet; a search would fetch them from the hub")


def _plan_without(config: SearchConfig, error: UserError, display: Display) -> None:
    """The space and the plan from the source's record alone. Raises ``error`` where the source is not known."""
    display.note(f"not here: {error}")
    try:
        with torch.device("meta"):
            arch = Arch.from_timm(timm.create_model(config.source.model, pretrained=False, **config.source.args))
    except (RuntimeError, UserError, TypeError):
        raise error from None
    table = config.space
    if table.latency_table is not None and not Path(table.latency_table).exists():
        display.note(f"not here: the latency table {table.latency_table}; make it with `prunesweep latency`")
        table = table.model_copy(update={"latency_table": None, "latency_ms": None})
    Space.check(table, arch, config.scores.method)
    space = Space.blank(table, arch, config.scores.method)
    display.note("without them, widths are cut as if all units were worth the same: costs are exact, shapes are not")
    display.space(space, space.summarise(SAMPLE, config.seed), None, None)
    display.plan(config, _slots_here(config))


def _slots_here(config: SearchConfig) -> int | None:
    try:
        return slots(config.resources)
    except UserError:
        return None


def _zero_shot(prepared: Prepared, summary: Summary) -> Spread:
    """Accuracy before finetuning, over a few points of the sample."""
    found = []
    for point in summary.points[:SCORED]:
        model = cut(prepared.model, prepared.space.decode(point).decision)
        recalibrate(model, prepared.data.calibration(EVAL_BATCH, EVAL_BATCH, 0))
        found.append(evaluate(model, prepared.data.val_loader(EVAL_BATCH))["top1"])
    return Spread.of(found)


def create_run(run: Run, config: SearchConfig, prepared: Prepared) -> None:
    """The run's folder, whole or not at all."""
    cost = prepared.cost
    latency = prepared.space.source_value("latency_ms") if config.space.latency_table else None
    facts = {
        "source": {
            "name": prepared.arch.source,
            "weights": prepared.weights,
            **Quality(prepared.top1, prepared.ppl).facts,
            "macs": cost.macs,
            "params": cost.params,
            **({} if latency is None else {"latency_ms": latency}),
        },
        "data": prepared.data.info.fingerprint,
        "scores": {kind: path.name for kind, path in prepared.score_files.items()},
        "versions": versions(),
    }
    with publish_folder(run.path) as folder:
        write_text(folder / "search.toml", config.to_toml())
        shutil.copytree(prepared.folder, folder / "source")
        (folder / "scores").mkdir()
        for path in prepared.score_files.values():
            shutil.copy2(path, folder / "scores" / path.name)
        (folder / "trials").mkdir()
        write_text(folder / "run.json", json.dumps(facts, indent=1))


def _search(
    run: Run, config: SearchConfig, space: Space, display: Display, *, address: str | None, verbose: bool
) -> SearchResult:
    """The search proper: everything but the source, the scores and the space, which a run has from the start."""
    with Lease(run.path) as lease:
        run.stop_file.unlink(missing_ok=True)
        write_text(run / "search.toml", config.to_toml())
        study = Study(
            run / "study.journal",
            space.distributions,
            config.seed,
            objectives=config.search.objectives,
            sampler=config.search.sampler,
            trials=config.search.trials,
            start=_start_points(config, space),
        )
        coordinator = Coordinator(run, study, space, config.search, slots=1, seed=config.seed)
        source = run.facts()["source"]

        def ray_died() -> None:
            display.close()
            display.note(f"Ray died. No finished trial is lost: prunesweep resume {_shown(run)}")
            lease.release()
            os._exit(RAY_DIED)  # Ray's client code would end this process too, with exit code 0

        try:
            if not coordinator.done:
                with (
                    display.live(coordinator, source, config.space.budget) as changed,
                    _board(run, coordinator, source) as logged,
                    RayConnection(config.resources, address=address, verbose=verbose, on_death=ray_died) as connection,
                    _interruptible(coordinator, display),  # after Ray, which takes SIGTERM for itself
                ):
                    coordinator.slots = connection.slots
                    before, begun = len(coordinator.results), time.monotonic()
                    execute(coordinator, config.resources, [changed, logged])
                    display.overhead(coordinator, before, time.monotonic() - begun)
        except KeyboardInterrupt:
            if not coordinator.stopping:  # the second one ends a search that the first one has stopped already
                raise
        finally:
            run.stop_file.unlink(missing_ok=True)
            write_report(run)
        if coordinator.finished:
            display.front(coordinator.front, source["macs"])
        return SearchResult(run.path, run.front(absolute=True), coordinator.finished)


def _shown(run: Run) -> str:
    """The run's folder as a user would type it."""
    return os.path.relpath(run.path)


@contextlib.contextmanager
def _interruptible(coordinator: Coordinator, display: Display) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets the running trials save their state and end; the second one ends at once."""

    def interrupt(_signal: int, _frame: Any) -> None:
        if coordinator.stopping:
            raise KeyboardInterrupt
        coordinator.stop()
        display.note("stopping: the running trials save their state (once more to end at once)")

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _board(run: Run, coordinator: Coordinator, source: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """TensorBoard: hypervolume and front size over finished trials, and a row of hyperparameters per trial."""
    writer = SummaryWriter(str(run / "tb" / "search"))
    logged = len(coordinator.results)

    def changed() -> None:
        nonlocal logged
        for result in coordinator.results[logged:]:
            logged += 1
            objectives = coordinator.search.objectives
            found = [r for r in coordinator.results[:logged] if r.has_model]
            writer.add_scalar("hypervolume", hypervolume(found, source, objectives), logged)
            writer.add_scalar("front_size", len(pareto_front(found, objectives)), logged)
            values = {"hparam/top1": result.top1, "hparam/macs": result.macs}
            writer.add_hparams(dict(result.point), values, name=result.id)

    try:
        yield changed
    finally:
        writer.close()
