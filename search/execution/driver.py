"""Run a search from its configuration to its front, or resume one that was interrupted."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from rich.console import Console
from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import hparams, scalar

from prunesweep.models import Arch, LatencyTable, UserError, cost
from prunesweep.models.errors import NotHere
from prunesweep.models.io.files import disk_full, make_folder, publish_folder, sweep_below, write_text
from prunesweep.models.io.lock import Lock, Vanished, reserve
from prunesweep.models.io.objects import is_url, local_path, url_of
from prunesweep.models.io.provenance import versions
from prunesweep.models.io.scratch import remove_scratch_folders
from prunesweep.pruners.subspaces import can_recover
from prunesweep.search.config import ResourcesTable, SearchConfig, load_config, parse_config
from prunesweep.search.report.advice import advice
from prunesweep.search.report.display import Display
from prunesweep.search.report.page import write_report
from prunesweep.search.space.space import Space
from prunesweep.search.space.variables import MODEL
from prunesweep.search.space.warm_start import met_points, start_points
from prunesweep.search.store.front import OWN, QUALITIES, cost_of, hypervolume
from prunesweep.search.store.records import FORMAT, Result, sealed
from prunesweep.search.store.run import Run, failure_reasons
from prunesweep.search.store.stored import StoredRun
from prunesweep.search.tracking import check_backends, tracking
from prunesweep.search.tracking.ray_metrics import gauges
from prunesweep.training import Quality
from prunesweep.training.jobs.proposal import is_proposal
from prunesweep.training.jobs.ray_session import RAY_DIED, RayDied, check_starts
from prunesweep.training.own_measure import Measure, spec_of
from prunesweep.training.signals import handling

from .coordinator import Coordinator, RunBroken, SearchFailed
from .elsewhere import Access, bring_prepared, prepare_part_there, prepare_there, run_there, work_there
from .estimate import estimate
from .growth import Waiting
from .prepare import SAMPLE, PreparedSearch, prepare_or_share, prepare_search
from .remote import run_on_worker, run_on_workers
from .reopen import (
    check_data,
    check_given,
    check_study,
    open_study,
    reopen,
    settings_of,
    space_of,
    study_of,
    write_config,
)
from .runtime import RayConnection, execute, max_concurrent, node
from .source import NotMade, Progress, SourceArtifacts, open_space, prepare_part
from .speed import measure_speed
from .task import run_task
from .validation import validate_front

__all__ = ["RAY_DIED", "SearchResult", "resume_search", "run_search"]

TAKEN_OVER = 4  # exit code
REPORT_EVERY = 20.0  # seconds, at least, between two reports while a search runs
GIVEN = "given"  # folder in a run's, of the saved models and decisions that it started from


@dataclass(frozen=True)
class SearchResult:
    """Where a search stands: its folder, its Pareto set (``Run.front``), and whether all trials are done."""

    path: Path
    front: list[dict[str, Any]]
    finished: bool


def run_search(
    config: SearchConfig | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    quality: Measure | str | None = None,
    on_trial: Callable[[Result], None] | None = None,
    progress: bool = False,
    console: Console | None = None,
    address: str | None = None,
    dry_run: bool = False,
    verbose: bool = False,
) -> SearchResult | None:
    """Run a search and return its front.

    Args:
        config: the configuration, its tables as a mapping, or the path of a TOML file.
        out: the run's folder, which must not exist yet (unless ``dry_run``); ``runs/NAME`` by default. Or a URL of an
            object store, such as ``s3://bucket/runs/NAME``: then work is done in a folder of this machine's cache, and
            what changes in it is published.
        quality: a function with the decorator ``training.own_quality``, in the place of the configuration's
            ``search.quality``.
        on_trial: called in this process with the result of every unit of work that has finished.
        progress: draw on standard output, as the command does.
        console: where to draw instead; nothing is drawn by default.
        address: of a running Ray cluster, all of whose nodes see ``out``; a Ray of its own by default.
        dry_run: stop, and return None, after the space, the plan and an estimate were shown. Nothing is downloaded,
            trained, scored or measured: what is not there is named, and then the space is what the architecture alone
            can tell.
        verbose: show Ray's own log lines.

    Raises:
        UserError: the configuration, the data or the source cannot be used; nothing is created.
        SearchFailed: too many trials failed, or what all of them need is gone (``RunBroken``).
    """
    if isinstance(config, Mapping):
        config = parse_config(dict(config), "the configuration")
    elif not isinstance(config, SearchConfig):
        config = load_config(config)
    config = _with_direction(config if quality is None else _with_quality(config, spec_of(quality)))
    display = Display(console or Console(quiet=not progress))
    stored = None if out is None or not is_url(out) else _stored(out, display, new=True)
    place_of_run = Path("runs") / config.name if out is None else local_path(out)
    run = Run(place_of_run if stored is None else stored.path)
    if stored is None and run.path.exists() and not dry_run:
        if Run.is_one(run.path):
            remedy = f"go on with 'prunesweep resume {run.shown}', or choose another folder with --out"
        else:
            remedy = "and is no run, so nothing can go on there: choose another folder with --out"
        raise UserError(f"{run.shown} exists: {remedy}")
    config = _with_table(config, config.space.latency_table)
    check_backends(config.logging)
    died = "Ray died before the first trial; the same command goes on from what is saved"
    ray = RayConnection(
        config.resources,
        address=address,
        verbose=verbose,
        on_death=_leaving(display, died),
        cluster=config.cluster,
    )
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as place:
        if not dry_run:
            if stored is not None:
                stack.enter_context(stored)
            place.enter_context(reserve(run.path))
            check_study(config, run.path)
        if address is not None:
            stack.enter_context(ray)
        units = _concurrency(config, ray if address is not None else None, must_fit=not dry_run)
        here = units if address is None else None
        try:
            cache = run.path.parent / "cache"
            prepared = _prepare(config, cache, display, ray if address is not None else None, stored, dry_run=dry_run)
        except NotHere as error:
            if not dry_run:
                raise
            _plan_without(config, error, display, units, here)
            return None
        space = open_space(config, prepared)
        display.data(prepared.described)
        search = config.search
        display.space(space, prepared.summary, prepared.figures, prepared.zero_shot, search.objectives, search.quality)
        if config.search.recover and (reason := can_recover(prepared.arch)):
            display.note(f"candidates start as cut, not recovered: {reason}")
        if dry_run:
            _with_start(config, space, prepared.proposals, display)
            display.plan(config, units)
            train = prepared.content["train"]["images"] - prepared.content["held_out"]
            display.note(estimate(config, prepared.arch, prepared.summary, train, here))
            return None
        display.plan(config, units)
        config = _with_start(config, space, prepared.proposals, display)
        config = create_run(run, config, prepared)
        if stored is not None:
            stored.publish()
        place.close()
        connection = ray if address is None else contextlib.nullcontext(ray)
        on_worker = address is not None
        return _search(run, config, space, display, connection, stored, on_worker=on_worker, on_trial=on_trial)


def resume_search(
    path: str | Path,
    *,
    trials: int | None = None,
    overrides: Sequence[str] = (),
    retry_failed: bool = False,
    on_trial: Callable[[Result], None] | None = None,
    progress: bool = False,
    console: Console | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> SearchResult:
    """Go on with a search that was stopped or killed; unfinished trials first, from their last epoch.

    Args:
        path: the run's folder, or its URL.
        trials: a new number of trials; what the run was made with by default.
        overrides: ``key.path=value`` for other keys that change neither a candidate nor a figure
            (``reopen.HARMLESS``), and the place of data that were moved.
        retry_failed: do those trials again that have failed; what they failed by is kept beside their results.
        on_trial: called in this process with the result of every unit of work that has finished.
        progress: draw on standard output, as the command does.
        console: where to draw instead; nothing is drawn by default.
        address: of a running Ray cluster; a Ray of its own by default.
        verbose: show Ray's own log lines.

    Raises:
        UserError: ``path`` is no run, another process is working on it, the data are not those that it was made on, or
            its settings were edited or overridden so that the search would change.
        SearchFailed: too many trials failed, or what all of them need is gone (``RunBroken``).
    """
    display = Display(console or Console(quiet=not progress))
    more = [] if trials is None else [f"search.trials={trials}"]
    options: dict[str, Any] = {"retry_failed": retry_failed, "on_trial": on_trial}
    if not is_url(path):
        run = Run.existing(local_path(path))
        return _resume(run, [*overrides, *more], display, None, address, options, verbose=verbose)
    with _stored(path, display, new=False) as stored:
        run = Run.existing(stored.path)
        return _resume(run, [*overrides, *more], display, stored, address, options, verbose=verbose)


def _stored(place: str | Path, display: Display, *, new: bool) -> StoredRun:
    """A run on an object store, that is not opened yet."""
    return StoredRun(url_of(place), display.note, lambda lost: _leave(display, str(lost), TAKEN_OVER), new=new)


def _resume(
    run: Run,
    overrides: Sequence[str],
    display: Display,
    stored: StoredRun | None,
    address: str | None,
    options: Mapping[str, Any],
    *,
    verbose: bool,
) -> SearchResult:
    config = reopen(run, overrides, on_note=display.note)
    check_given(run, config)
    _with_direction(config)  # a function of one's own must be there
    check_backends(config.logging)
    space = space_of(run, config)
    ray = RayConnection(
        config.resources,
        address=address,
        verbose=verbose,
        on_death=_leaving(display, _died(run)),
        cluster=config.cluster,
    )
    if address is None:
        check_starts(max_concurrent(config.resources) * config.resources.workers_per_trial)
        check_data(run, config)
        return _search(run, config, space, display, ray, stored, **options)
    with ray:
        with display.progress() as shown:
            check: Callable[[Progress], object] = partial(_check_there, run.path, config)
            if stored is not None:
                check = partial(work_there, _check_there, run.path, config, access=_access(stored))
            run_on_worker(check, config.resources, shown, note=display.note)
        connection = contextlib.nullcontext(ray)
        return _search(run, config, space, display, connection, stored, on_worker=True, **options)


def _with_quality(config: SearchConfig, spec: str) -> SearchConfig:
    """Set ``search.quality``; the quality among the objectives gives way to it."""
    objectives = tuple(OWN[0] if name in QUALITIES else name for name in config.search.objectives)
    table = {**config.search.model_dump(), "quality": spec, "objectives": objectives}
    return parse_config({**config.model_dump(), "search": table}, "the configuration")


def _with_direction(config: SearchConfig) -> SearchConfig:
    """Say among the objectives whether more or less of ``search.quality`` is better, as its function says."""
    if config.search.quality is None:
        return config
    own = Quality.find(config.search.quality).objective
    objectives = tuple(own if name in OWN else name for name in config.search.objectives)
    return config.model_copy(update={"search": config.search.model_copy(update={"objectives": objectives})})


def _check_there(path: Path, config: SearchConfig, progress: Progress) -> None:
    """``check_data`` on a worker: the driver's machine may not have the data."""
    progress("comparing the data", 0.0, "")
    check_data(Run(path), config)
    progress("comparing the data", 1.0, "")


def _with_table(config: SearchConfig, path: str | Path | None) -> SearchConfig:
    """Set the configuration's latency table to ``path``, made absolute because other processes read it too."""
    name = None if path is None else str(Path(path).expanduser().absolute())
    return config.model_copy(update={"space": config.space.model_copy(update={"latency_table": name})})


def _with_start(config: SearchConfig, space: Space, proposals: Sequence[Path], display: Display) -> SearchConfig:
    """Put all points to start from into ``search.start``, so that they are the same when the run is resumed.

    Says which of those that were given cannot meet their budgets, and what takes their place.

    Raises:
        UserError: a point is not in the space.
    """
    points = tuple(dict(point) for point in met_points(space, start_points(config, space, proposals)))
    for given, taken in zip(config.search.start, points, strict=False):
        if MODEL not in given and (moved := [name for name in given if given[name] != taken[name]]):
            values = ", ".join(f"{name} = {taken[name]:.4g}" for name in moved)
            display.note(f"search.start: {given} cannot meet its budget; its place takes the point with {values}")
    changes = {"start": points, "start_from": (), "start_neutral": 0, "start_published": False, "start_methods": ()}
    return config.model_copy(update={"search": config.search.model_copy(update=changes), "start": {}})


def _with_models(config: SearchConfig, folder: Path) -> SearchConfig:
    """Copy the models and decisions that a search starts from into the run's ``folder``, where its points find them."""
    points = list[dict[str, float | int | str]]()
    for point in config.search.start:
        if MODEL in point:
            given, name = Path(str(point[MODEL])), f"{GIVEN}/{len(points)}"
            if is_proposal(given):
                name += given.suffix
                make_folder(folder / GIVEN)
                shutil.copy2(given, folder / name)
            else:
                shutil.copytree(given, folder / name)
            point = {**point, MODEL: name}
        points.append(point)
    return config.model_copy(update={"search": config.search.model_copy(update={"start": tuple(points)})})


def _prepare(
    config: SearchConfig,
    cache: Path,
    display: Display,
    cluster: RayConnection | None,
    stored: StoredRun | None,
    *,
    dry_run: bool,
) -> PreparedSearch:
    """Call ``prepare_search`` here, or on a worker of the cluster that was joined.

    Where there is enough of it, all workers that fit make the scores and ask the teacher first.
    """
    work = partial(prepare_search, config, cache, dry=dry_run)
    with display.progress() as progress:
        if cluster is None or (stored is not None and dry_run):
            return work(progress)
        run = partial(run_on_worker, resources=config.resources, progress=progress, note=display.note)
        places = 1 if dry_run else cluster.fitting * config.resources.workers_per_trial
        if stored is not None:  # they share no cache
            own: dict[str, Any] = {"access": _access(stored)}
            if (table := config.space.latency_table) is not None:
                LatencyTable.load(Path(table))
                own["table"] = Path(table).read_text(encoding="utf-8")
            made = run(partial(prepare_there, config, cache, share=max(places, 1), **own))
            if isinstance(made, int):
                some = [partial(prepare_part_there, config, cache, part=i, parts=made, **own) for i in range(made)]
                run_on_workers(some, config.resources, progress, note=display.note)
                made = run(partial(prepare_there, config, cache, **own))
            assert not isinstance(made, int)  # which only more than one process is asked for
            return bring_prepared(stored.objects, *made, cache)
        found = run(work if places < 2 else partial(prepare_or_share, config, cache, places))
        if isinstance(found, int):
            parts = [partial(prepare_part, config, cache, part=i, parts=found) for i in range(found)]
            run_on_workers(parts, config.resources, progress, note=display.note)
            found = run(work)
    prepared: PreparedSearch = found
    for path in (
        prepared.folder,
        *prepared.score_files.values(),
        *prepared.proposals,
        *prepared.teacher_logits,
        *([prepared.subspaces] if prepared.subspaces else []),
    ):
        if not path.exists():
            raise UserError(
                f"{path} was written by a worker and is not seen here: all nodes must share the folder of --out"
            )
    return prepared


def _plan_without(config: SearchConfig, error: NotHere, display: Display, units: int | None, here: int | None) -> None:
    """Show the space and the plan from the source's record alone.

    Args:
        config: of the search.
        error: what is not here.
        display: where to show them.
        units: tasks that run side by side, if that is known.
        here: the same, where they run on this machine.

    Raises:
        NotHere: ``error``, if timm does not know the source.
    """
    known = error if isinstance(error, NotMade) else NotMade("")
    if known.described:
        display.data(known.described)
    display.note(f"{'first' if known.arch else 'not here'}: {error}")
    arch = known.arch
    try:
        if arch is None:
            with torch.device("meta"):
                arch = Arch.from_timm(timm.create_model(config.source.model, pretrained=False, **config.source.args))
    except (RuntimeError, UserError, TypeError):
        raise error from None
    table = config.space
    if table.latency_table is not None and not Path(table.latency_table).exists():
        display.note(f"not here: the latency table {table.latency_table}; make it with `prunesweep latency`")
        table = table.model_copy(update={"latency_table": None, "latency_ms": None})
    space = Space.check(table, arch, config.scores.method, projected=config.search.projects(arch))
    display.note("without that, widths are cut as if all units were worth the same: costs are exact, shapes are not")
    summary = space.summarise(SAMPLE, config.seed)
    display.space(space, summary, None, None, config.search.objectives)
    display.plan(config, units)
    if known.content:
        train = known.content["train"]["images"] - known.content["held_out"]
        display.note(estimate(config, arch, summary, train, here))


def _concurrency(config: SearchConfig, ray: RayConnection | None, *, must_fit: bool) -> int | None:
    """How many units run side by side on the cluster, with all nodes that may come, or, without one, here.

    None where none fits and none must, and where only the cluster knows how many nodes may come.
    """
    if ray is None and must_fit:
        check_starts(max_concurrent(config.resources) * config.resources.workers_per_trial)
    if ray is not None:
        if ray.most is None:
            return ray.fitting
        return None if math.isinf(ray.most) else int(max(ray.most, ray.fitting))
    try:
        return max_concurrent(config.resources)
    except UserError:
        if must_fit:
            raise
        return None


def create_run(run: Run, config: SearchConfig, kept: SourceArtifacts) -> SearchConfig:
    """Create a run's folder, complete or not at all, so that a resume needs nothing outside of it but the data.

    Args:
        run: its folder must not exist.
        config: of the search.
        kept: the source and its scores, which are copied.

    Returns:
        The configuration with the run's own copy of the latency table.
    """
    arch, table = kept.arch, config.space.latency_table
    spent = cost(arch)
    facts = {
        "format": FORMAT,
        "source": {
            "name": arch.source,
            "weights": kept.weights,
            **kept.figures.as_dict(),
            "search": kept.searched.as_dict(),
            "macs": spent.macs,
            "params": spent.params,
            **({} if table is None else {"latency_ms": LatencyTable.load(table).predict(arch)}),
        },
        "data": kept.fingerprint,
        "content": kept.content,
        "scores": {kind: path.name for kind, path in kept.score_files.items()},
        "versions": versions(),
    }
    with _first(run), publish_folder(run.path, replace=False) as folder:
        if table is not None:
            LatencyTable.load(table).save(folder / run.latency_table.name)
            config = _with_table(config, run.latency_table)
        config = _with_models(config, folder)
        write_config(folder, config)
        shutil.copytree(kept.folder, folder / "source")
        (folder / "scores").mkdir()
        for path in kept.score_files.values():
            shutil.copy2(path, folder / "scores" / path.name)
        if kept.subspaces is not None:
            _link(str(kept.subspaces), str(folder / "scores" / kept.subspaces.name))
        for path in kept.teacher_logits:  # large, and never written again
            shutil.copytree(path, folder / run.teacher_logits.name / path.name, copy_function=_link)
        (folder / "trials").mkdir()
        write_text(folder / "run.json", sealed({**facts, "settings": settings_of(config)}))
    return config


@contextlib.contextmanager
def _first(run: Run) -> Iterator[None]:
    """Say what a run's folder that is there all of a sudden means."""
    try:
        yield
    except FileExistsError as error:
        if error.filename != str(run.path):
            raise
        raise UserError(
            f"{run.shown} has just been made by another process: when that has ended, go on with 'prunesweep resume "
            f"{run.shown}', or choose another folder with --out"
        ) from error


def _link(source: str, target: str) -> None:
    """Make a hard link to a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _died(run: Run) -> str:
    return f"Ray died. No finished trial is lost: prunesweep resume {run.shown}"


def _access(stored: StoredRun) -> Access:
    """What processes of the cluster that this one has joined need to know of a run on an object store."""
    return Access(stored.url, stored.number, node())


def _work(lock: Lock, stored: StoredRun | None) -> Callable[..., Mapping[str, Any]]:
    """What does a trial."""
    if stored is None:
        return partial(run_task, fence=lock.fence)
    return partial(run_there, access=_access(stored), fence=lock.fence)


def _telling(coordinator: Coordinator, on_trial: Callable[[Result], None] | None) -> Callable[[], None]:
    """Return a function that calls ``on_trial`` with the results that have come since."""
    told = {(result.trial, result.rung) for result in coordinator.results}

    def tell() -> None:
        if on_trial is None:
            return
        for result in list(coordinator.results):
            if (result.trial, result.rung) not in told:
                told.add((result.trial, result.rung))
                on_trial(result)

    return tell


def _leaving(
    display: Display, text: str, lock: Lock | None = None, stored: StoredRun | None = None
) -> Callable[[], NoReturn]:
    """Return a function that prints ``text`` and ends this process; Ray would end it too, but with exit code 0."""

    def leave() -> NoReturn:
        if stored is not None:
            stored.close(RayDied("Ray died"))
        if lock is not None:
            lock.release()
        _leave(display, text, RAY_DIED)

    return leave


def _leave(display: Display, text: str, code: int) -> NoReturn:
    """End this process from whatever thread, at once."""
    remove_scratch_folders()
    display.close()
    display.note(text)
    os._exit(code)


def _search(
    run: Run,
    config: SearchConfig,
    space: Space,
    display: Display,
    ray: AbstractContextManager[RayConnection],
    stored: StoredRun | None,
    *,
    retry_failed: bool = False,
    on_worker: bool = False,
    on_trial: Callable[[Result], None] | None = None,
) -> SearchResult:
    """Run the trials of a run whose source, scores and space are there; measure its front on a worker or here."""
    with run.lock(lambda lost: _leave(display, str(lost), TAKEN_OVER)) as lock, contextlib.ExitStack() as stack:
        run = Run(run.path, lock.check)
        sweep_below(run.path)
        run.stop_file.unlink(missing_ok=True)
        shutil.rmtree(run.workers, ignore_errors=True)
        display.failures(run.failures(), again=retry_failed)
        if retry_failed:
            run.forget_failures()
        lock.check()
        write_config(run.path, config)
        study = open_study(run, config, space, study_of(run, config))
        coordinator = Coordinator(run, study, space, config.search, max_concurrent=1, seed=config.seed)
        source = run.searched_source()
        for note in coordinator.notes:
            display.note(note)
        told = stack.enter_context(tracking(run, config, coordinator, source, display.note))
        try:
            if not coordinator.done:
                with (
                    display.live(coordinator, source, config.space.budget) as changed,
                    _board(run, coordinator, source) as logged,
                    ray as connection,
                    _interruptible(coordinator, display),  # after Ray, which takes SIGTERM for itself
                ):
                    connection.on_death = _leaving(display, _died(run), lock, stored)
                    if stored is not None:
                        stored.elsewhere = on_worker
                        stored.follow(coordinator)
                    room = _Room(connection, coordinator, config.resources, display)
                    metrics = [gauges(config.name, coordinator, source)] if on_worker else []
                    before, begun = len(coordinator.results), time.monotonic()
                    execute(
                        coordinator,
                        config.resources,
                        [
                            changed,
                            logged,
                            _reporter(run, coordinator),
                            _telling(coordinator, on_trial),
                            told.changed,
                            *metrics,
                        ],
                        count=room.look,
                        note=display.note,
                        work=_work(lock, stored if on_worker else None),
                        stored=stored if on_worker else None,
                    )
                    display.overhead(coordinator, before, time.monotonic() - begun, room.seconds)
        except KeyboardInterrupt:
            if not coordinator.stopping:  # the second one ends a search that the first one has stopped already
                raise
        except RayDied as death:
            raise RayDied(f"{death}. No finished trial is lost: prunesweep resume {run.shown}") from death
        except RunBroken as broken:
            _check_there_still(run, broken)
            raise RunBroken(
                f"{run.shown}: no trial can be done: {broken}\n"
                f"No candidate has failed by that; once it is mended: prunesweep resume {run.shown}"
            ) from broken
        except (OSError, Vanished) as error:
            _check_there_still(run, error)
            if not disk_full(error):
                raise
            raise UserError(
                f"{run.shown}: no space is left on its disk. Nothing that is finished is lost: make room, then "
                f"prunesweep resume {run.shown}"
            ) from error
        finally:
            run.stop_file.unlink(missing_ok=True)
            shutil.rmtree(run.workers, ignore_errors=True)
            if run.path.is_dir():
                _write_report(run)
        if coordinator.finished and not coordinator.measured:
            raise SearchFailed(_nothing_found(run, coordinator))
        if coordinator.finished:
            study.settle(coordinator.results)
            _measure_front(run, config, display, stored, on_worker=on_worker)
            run.write_advice(lines := advice(run))
            _write_report(run)
            spent = cost_of(run.objectives)
            display.front([{**p, "model": f"{run.shown}/{p['model']}"} for p in run.front()], source[spent], spent)
            display.advice(lines)
        return SearchResult(run.path, run.front(absolute=True), coordinator.finished)


def _measure_front(
    run: Run, config: SearchConfig, display: Display, stored: StoredRun | None, *, on_worker: bool
) -> None:
    """Measure the front on the validation split and on test data, and its speed where that is wanted."""
    looks: list[Callable[[Path, SearchConfig, Progress], None]] = []
    if config.data.search_split or config.data.test is not None:
        looks.append(validate_front)
    if config.search.measure_front:
        looks.append(measure_speed)
    for look in looks:
        work = partial(look, run.path, config)
        with display.progress() as progress:
            if on_worker and stored is not None:
                run.write_front()
                stored.publish()
                there = partial(work_there, look, run.path, config, access=_access(stored), models=True)
                made = run_on_worker(there, config.resources, progress, note=display.note)
                for name, text in made.items():
                    write_text(run / name, text)
            elif on_worker:
                run_on_worker(work, config.resources, progress, note=display.note)
            else:
                work(progress)
    run.write_front()


def _check_there_still(run: Run, error: Exception) -> None:
    """Raise UserError where an error of a search means that the run's folder is gone."""
    if not run.path.is_dir():
        raise UserError(
            f"{run.shown} is gone, and its storage with it: bring that back, then prunesweep resume {run.shown}"
        ) from error


def _nothing_found(run: Run, coordinator: Coordinator) -> str:
    """Why a search has ended without any candidate that can be compared."""
    reasons = failure_reasons(coordinator.failures)
    if coordinator.results:
        reasons.append(f"{len(coordinator.results)} x no number: training diverged; lower finetune.lr or space.lr")
    text = "\n".join(f"  {reason}" for reason in reasons)
    again = f"\nOnce that is mended: prunesweep resume {run.shown} --retry-failed" if coordinator.failures else ""
    return f"no trial of {run.shown} has a result that can be compared:\n{text}{again}"


class _Room:
    """How many units may be handed out, as nodes come and go; tells the user when they do, and what is waited for.

    Attributes:
        seconds: time of all places for units together, in which units could run.
    """

    def __init__(
        self, connection: RayConnection, coordinator: Coordinator, resources: ResourcesTable, display: Display
    ) -> None:
        self._connection, self._coordinator, self._display = connection, coordinator, display
        self._waiting = Waiting(resources, display.note)
        self._fitting, self._looked, self.seconds = connection.fitting, time.monotonic(), 0.0
        coordinator.max_concurrent = connection.max_concurrent

    def look(self) -> int:
        """Count again."""
        now, fitting = time.monotonic(), self._connection.fitting
        self.seconds += (now - self._looked) * self._fitting
        if fitting != self._fitting:
            units = "unit fits" if fitting == 1 else "units fit"
            self._display.note(f"{fitting} {units} on the cluster's nodes now, before it were {self._fitting}")
        self._fitting, self._looked = fitting, now
        asked = f"; {self._coordinator.live} units have been handed out" if self._coordinator.live else ""
        self._waiting.look(not fitting, asked)
        return self._connection.max_concurrent


def _reporter(run: Run, coordinator: Coordinator) -> Callable[[], None]:
    """Return a function that writes the report again once something has ended, in at most a twentieth of the time."""
    told, due = coordinator.settled, time.monotonic() + REPORT_EVERY

    def changed() -> None:
        nonlocal told, due
        if coordinator.settled == told or time.monotonic() < due:
            return
        begun, told = time.monotonic(), coordinator.settled
        _write_report(run)
        due = time.monotonic() + max(REPORT_EVERY, 20 * (time.monotonic() - begun))

    return changed


def _write_report(run: Run) -> None:
    try:
        write_report(run)
    except OSError as error:  # what ended the search is said, not that there is no room for a page either
        if not disk_full(error):
            raise


def _interruptible(coordinator: Coordinator, display: Display) -> AbstractContextManager[None]:
    """Handle Ctrl-C and SIGTERM: the first lets running trials save their state and end, the second ends at once."""

    def interrupt(_signal: int, _frame: Any) -> None:
        if coordinator.stopping:
            raise KeyboardInterrupt
        coordinator.stop()
        display.note("stopping: the running trials save their state (once more to end at once)")

    return handling(interrupt, signal.SIGINT, signal.SIGTERM)


def log_point(board: Path, result: Result, found: Mapping[str, float]) -> None:
    """Log a candidate's point and what it gave for TensorBoard, as ``SummaryWriter.add_hparams`` does.

    That starts a thread for every file, and waits for it to end.
    """
    board.mkdir(parents=True, exist_ok=True)
    file = EventsWriter(str(board / "events"), f".rung-{result.rung}")
    scalars = [scalar(name, value) for name, value in found.items()]
    for summary in (*hparams(dict(result.point), dict(found)), *scalars):
        file.write_event(Event(wall_time=time.time(), step=result.rung, summary=summary))
    file.close()


@contextlib.contextmanager
def _board(run: Run, coordinator: Coordinator, source: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Log to TensorBoard: hypervolume and size of the front by finished trials, and hyperparameters of every trial."""
    writer = SummaryWriter(str(run / "tb" / "search"))
    logged, objectives = len(coordinator.results), coordinator.search.objectives
    volume, of = 0.0, list[Result]()

    def changed() -> None:
        nonlocal logged, volume, of
        new, best = coordinator.results[logged:], coordinator.best
        logged += len(new)
        if new:
            if best != of:  # most results change nothing, and of three objectives it takes long
                volume, of = hypervolume(best, source, objectives), list(best)
            writer.add_scalar("hypervolume", volume, logged)
            writer.add_scalar("front_size", len(best), logged)
        for result in new:
            names = dict.fromkeys((*objectives, *coordinator.search.ranking.names(result.epochs)))
            found = {f"hparam/{name}": v for name in names if (v := getattr(result, name)) is not None}
            log_point(run.board(result.trial), result, found)

    try:
        yield changed
    finally:
        writer.close()
