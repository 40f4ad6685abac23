"""Work of a run on an object store, on nodes that do not see the driver's folder.

Such a node has a folder of its own, ``workers/NAME`` of its cache. What all trials need is brought there once; the own
files of a trial are brought before it, published as it goes on, and removed after it. Its result goes back to the
driver, who alone publishes results. A training's state is published every half minute, so that a trial whose node was
lost goes on elsewhere from there.

Workers of a trial of several see neither its folder nor each other's: each brings what the training begins with, the
first one publishes its state and hands the trained model in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import ray

from prunesweep.models.errors import UserError
from prunesweep.models.io.files import disk_full, make_folder, publish_folder, write_text
from prunesweep.models.io.lock import Fence, Lost
from prunesweep.models.io.objects import Objects, joined
from prunesweep.models.io.provenance import digest
from prunesweep.models.io.threads import beside
from prunesweep.search.config import SearchConfig
from prunesweep.search.store.lease import LEASES, highest
from prunesweep.search.store.mirror import Mirror, place_for
from prunesweep.search.store.progress import BEGUN
from prunesweep.search.store.records import read_json
from prunesweep.search.store.run import Run, Task, task_id
from prunesweep.search.store.stored import HANDED, PREPARED, STATE, STOPPING, TRAINING, WORKERS
from prunesweep.training.jobs.recovery import STATISTICS
from prunesweep.training.jobs.scoring import Progress
from prunesweep.training.jobs.training_job import CannotBegin, TrainingJob

from .prepare import PreparedSearch, prepare_search
from .source import Unshared, prepare_part
from .task import run_task

__all__ = [
    "Access",
    "PromotedFiles",
    "UnitFiles",
    "bring_prepared",
    "prepare_part_there",
    "prepare_there",
    "run_there",
    "unit_files",
    "work_there",
]

INPUTS = ("source/", "scores/", "given/", "teacher_logits/")
FACTS = ("search.toml", "run.json", "latency_table.json")
WHOLE = ("/config.json", f"/{STATISTICS}")  # files that are written last in their folders
OWN = ("validation.json", "test.json", "speed.json")  # files that work on a whole run makes
CARRIED = ("metrics.jsonl", "arch.json", BEGUN, TRAINING)  # files that are published while a trial goes on
LOOK = 3.0  # seconds between two looks whether to stop
PATIENCE = 120.0  # seconds for a model that was handed in to be there
LIMIT = 50 * 2**30  # bytes of a node's folders for other runs, of which the longest unused go
START, MADE, STOP = "start/", "made/", "stop"  # of a trial of several workers, until its training is done
UNUSED = 2 * 24 * 3600.0  # seconds, before that none goes


class Access(NamedTuple):
    """What a process anywhere needs to know of a run on an object store.

    Args:
        url: of the run.
        number: of the driver's lease.
        node: Ray's name of the driver's node, whose processes see the driver's folder.
    """

    url: str
    number: int
    node: str

    @property
    def here(self) -> bool:
        """Whether this process sees the driver's folder."""
        return bool(ray.get_runtime_context().get_node_id() == self.node)

    def check(self) -> None:
        """Raise Lost where another driver has taken over; as ``Fence``'s."""
        if highest(Objects(self.url, known=True).list(LEASES)) > self.number:
            raise Lost(f"{self.url}: another driver has taken over; nothing more is published")

    def objects(self) -> Objects:
        """The run's; nothing is published by them once another driver has taken over."""
        found = Objects(self.url, known=True)
        found.guard = self.check
        return found

    def cache(self, of_driver: Path) -> Path:
        """This node's cache: the driver's where that is seen."""
        return of_driver if self.here else place_for(self.url, "workers").parent.parent / "cache"

    @property
    def workers(self) -> str:
        """The URL of what Ray Train keeps of workers of trials."""
        return joined(self.url, WORKERS)

    def unit(self, name: str) -> UnitFiles:
        """Where the files of a trial of several workers are."""
        return UnitFiles(self, name)

    @lru_cache(maxsize=1)  # noqa: B019 (a tuple: the last one's folder is kept for the next trial of this process)
    def opened(self) -> Mirror:
        """This node's folder, with what all trials need."""
        path = place_for(self.url, "workers")
        path.mkdir(parents=True, exist_ok=True)
        objects = self.objects()
        mirror = Mirror(path, objects)
        mirror.bring(FACTS)
        for below in INPUTS:
            mirror.pull(keep_news=True, below=below)
        if objects.stamp(STOPPING) is None:
            Run(path).stop_file.unlink(missing_ok=True)
        mirror.save()
        _trim(path)
        return mirror


def run_there(path: Path, unit: Task, files: Mapping[str, str], *, access: Access, fence: Fence) -> dict[str, Any]:
    """``run_task`` on any node.

    Args:
        path: the driver's folder.
        unit: the task.
        files: what the driver has of the candidate, by name.
        access: to the run.
        fence: of the driver's folder.

    Returns:
        As ``run_task``; with ``elsewhere``, true where the driver does not see what was made, and ``disk``, a folder
        there whose disk is full.
    """
    if access.here:
        return run_task(path, unit, fence, access)
    disk = str(next(p for p in place_for(access.url, "workers").parents if p.is_dir()))
    try:
        mirror = access.opened()
        with unit_files(mirror, unit, files):
            found = run_task(mirror.path, unit, access, access)
    except Lost as lost:
        return {"state": "broken", "reason": str(lost)}
    except UserError as error:  # the store, which has been asked for minutes
        return {"state": "broken", "reason": str(error)}
    except OSError as error:
        if not disk_full(error):
            raise
        found = {"state": "disk full"}
    return {**found, "elsewhere": True, "disk": disk}


@contextlib.contextmanager
def unit_files(mirror: Mirror, unit: Task, files: Mapping[str, str]) -> Iterator[None]:
    """Bring a trial's files, publish what changes of them meanwhile, and hand in, at the end, all but its result.

    Args:
        mirror: this node's folder; nothing of the trial stays in it.
        unit: the trial on its rung.
        files: what the driver has of it, by name.
    """
    run, own = Run(mirror.path), f"trials/{unit.id}/"
    folders = [own, *([f"trials/{task_id(unit.number, unit.rung - 1)}/"] if unit.rung else [])]
    for below in folders:
        mirror.pull(below=below)
    for name, text in files.items():
        (mirror.path / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.path / name).write_text(text, encoding="utf-8")
    if unit.rung:
        _wait_for_model(mirror, folders[1])
    result, handed = (mirror.path / own / name for name in ("result.json", HANDED))
    result.unlink(missing_ok=True)
    if handed.is_file():
        handed.replace(result)
        if not _has_finished(run, unit):
            result.unlink()

    def carry() -> None:
        mirror.push(name for name in mirror.files(own) if name.endswith(CARRIED))

    with _meanwhile(mirror.objects, run.stop_file, carry):
        yield
    (mirror.path / own / BEGUN).unlink(missing_ok=True)
    board = run.board(unit.number).relative_to(run.path).as_posix()
    made = [name for name in (*mirror.files(own), *mirror.files(board)) if not name.endswith("/result.json")]
    mirror.push(made)
    mirror.drop(own)
    if _has_finished(run, unit):
        mirror.objects.put(f"{own}{HANDED}", result)  # as it is: there may be no room for a copy
    for below in {*folders, *(f"{Path(name).parent}/" for name in files)}:
        shutil.rmtree(mirror.path / below, ignore_errors=True)


def _has_finished(run: Run, unit: Task) -> bool:
    with contextlib.suppress(UserError):
        found = run.read_result(unit.id)
        return found is not None and found["state"] == "finished"
    return False


def _meanwhile(objects: Objects, stop_file: Path, carry: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Call ``carry`` from time to time, and make a file once the search stops, in a thread, during a ``with`` block."""

    def look(over: threading.Event) -> None:
        due = 0.0
        while not over.wait(LOOK):
            with contextlib.suppress(UserError, OSError):
                if objects.stamp(STOPPING) is not None:
                    stop_file.touch()
                if time.monotonic() >= due:
                    carry()
                    due = time.monotonic() + STATE

    return beside(look)


class UnitFiles(NamedTuple):
    """The files of a trial of several workers, none of whom sees its folder; what ``warm_workers.Elsewhere`` says.

    Args:
        access: to the run.
        name: of the trial on its rung.
    """

    access: Access
    name: str

    def give(self, job: TrainingJob) -> None:
        """Publish the model that the training begins with."""
        with _blaming_the_store():
            _put_folder(self.access.objects(), Path(job.model), f"{self._own}{START}")

    def take(self, out: Path) -> None:
        """Bring the trained model as the folder ``out``."""
        with _blaming_the_store():
            objects, below = self.access.objects(), f"{self._own}{MADE}"
            with publish_folder(out) as folder:
                _get_folder(objects, below, folder)
        self.forget()

    def forget(self) -> None:
        """Delete what only an unfinished training needs."""
        with _blaming_the_store():
            objects = self.access.objects()
            names = [n for below in (START, MADE) for n in objects.list(f"{self._own}{below}")]
            list(objects.each(objects.delete, [*names, f"{self._own}{TRAINING}"]))

    def seen_from(self, job: TrainingJob, folder: Path) -> TrainingJob:
        """The job by the paths of this node's folder for the run, and of the worker's own ``folder``."""
        run = Run(place_for(self.access.url, "workers"))
        return replace(
            job,
            model=str(folder / START),
            teacher=None if job.teacher is None else str(run / "source"),
            teacher_cache=None if job.teacher_cache is None else str(run.teacher_logits),
            stop_file=str(folder / STOP),
        )

    def bring(self, job: TrainingJob, folder: Path) -> None:
        """Bring what all trials need, once, and this trial's first model and its state."""
        with _blaming_the_store():
            self.access.opened()
            objects = self.access.objects()
            _get_folder(objects, f"{self._own}{START}", folder / START)
            with contextlib.suppress(FileNotFoundError):
                objects.get(f"{self._own}{TRAINING}", folder / TRAINING)

    @contextlib.contextmanager
    def carrying(self, job: TrainingJob, folder: Path) -> Iterator[None]:
        """Publish the state every half minute and at the end, unless the training is over by then."""
        objects, state, published = self.access.objects(), folder / TRAINING, _changed(folder / TRAINING)

        def carry() -> None:
            nonlocal published
            if (now := _changed(state)) is not None and now != published:
                objects.put(f"{self._own}{TRAINING}", state)
                published = now

        with _meanwhile(objects, folder / STOP, carry):
            yield
        with _blaming_the_store():
            carry()

    def hand_in(self, made: Path) -> None:
        """Publish the trained model for who waits for it."""
        with _blaming_the_store():
            _put_folder(self.access.objects(), made, f"{self._own}{MADE}")

    @property
    def _own(self) -> str:
        return f"trials/{self.name}/"


class PromotedFiles(NamedTuple):
    """What workers of a promotion begin with, where they see no folder of the run; what ``Inputs`` says.

    Args:
        access: to the run, which is only read.
        unit: the task whose model is promoted.
    """

    access: Access
    unit: str

    def seen_from(self, job: TrainingJob, folder: Path) -> TrainingJob:
        """The job by the paths of this node's folder for the run, and of the worker's own ``folder``."""
        source = str(Run(place_for(self.access.url, "workers")) / "source")
        return replace(job, model=str(folder / START), teacher=source, teacher_cache=None)

    def bring(self, job: TrainingJob, folder: Path) -> None:
        """Bring what all trials need, once, and the model."""
        with _blaming_the_store():
            self.access.opened()
            _get_folder(self.access.objects(), f"trials/{self.unit}/model/", folder / START)


@contextlib.contextmanager
def _blaming_the_store() -> Iterator[None]:
    """Turn what the store or another driver is to blame for into CannotBegin: it is no candidate's fault."""
    try:
        yield
    except UserError as error:
        raise CannotBegin(str(error)) from error


def _changed(file: Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError):
        facts = file.stat()
        return facts.st_size, facts.st_mtime_ns
    return None


def _put_folder(objects: Objects, folder: Path, below: str) -> None:
    files = {f"{below}{p.relative_to(folder).as_posix()}": p for p in folder.rglob("*") if p.is_file()}
    list(objects.each(lambda name: objects.put(name, files[name]), files))


def _get_folder(objects: Objects, below: str, folder: Path) -> None:
    names = list(objects.list(below))
    list(objects.each(lambda name: objects.get(name, folder / name.removeprefix(below)), names))


def _wait_for_model(mirror: Mirror, below: str) -> None:
    """Wait for the model of the rung below, which the driver is publishing perhaps."""
    facts = read_json(mirror.path / below / "result.json")
    wanted = {f"{below}model/config.json", f"{below}model/model.safetensors"}
    deadline = time.monotonic() + PATIENCE
    while facts.get("result", {}).get("has_model") and not all((mirror.path / name).is_file() for name in wanted):
        if time.monotonic() > deadline:
            return  # it is gone, and trained again
        time.sleep(1.0)
        mirror.pull(below=below, keep_news=True)


def work_there(
    work: Callable[[Path, SearchConfig, Progress], None],
    path: Path,
    config: SearchConfig,
    progress: Progress,
    *,
    access: Access,
    models: bool = False,
) -> dict[str, str]:
    """Do work on a whole run, on any node, and return the files that it made, by name, for the driver to write.

    Args:
        work: as ``validate_front``.
        path: the driver's folder.
        config: the search's.
        progress: as for ``work``.
        access: to the run.
        models: whether it needs all results, and the models of the front.
    """
    if access.here:
        work(path, config, progress)
        return {}
    mirror = access.opened()
    if models:
        mirror.bring(["front.json", "speed.json"])
        units = {task_id(*member) for member in Run(mirror.path).listed()}

        def wanted(name: str) -> bool:
            parts = name.split("/")
            whole = len(parts) > 1 and parts[1] in units
            return parts[0] == "trials" and (whole or parts[-1] in ("result.json", "validation.json", "test.json"))

        mirror.pull(wanted=wanted, below="trials/")
    before = {name: facts.st_mtime_ns for name, facts in mirror.files().items() if name.endswith(OWN)}
    work(mirror.path, config, progress)
    found = {name: facts for name, facts in mirror.files().items() if name.endswith(OWN)}
    made = {
        n: (mirror.path / n).read_text(encoding="utf-8") for n, f in found.items() if before.get(n) != f.st_mtime_ns
    }
    shutil.rmtree(mirror.path / "trials", ignore_errors=True)
    return made


def prepare_there(
    config: SearchConfig, cache: Path, progress: Progress, *, access: Access, share: int = 1, table: str | None = None
) -> tuple[PreparedSearch, Path | None] | int:
    """``prepare_search`` on any node; what it made is published for the driver where that does not see it.

    Args:
        config: the search's.
        cache: the driver's.
        progress: as for ``prepare_search``.
        access: to the run that will be.
        share: as for ``prepare_search``.
        table: what the latency table of the space says, which lies on the driver's machine perhaps; None without one.

    Returns:
        That, and the cache of this node where it is another one than the driver's. Or the number of parts that
        ``prepare_part_there`` is to make before; the source is published for them.
    """
    objects, own = access.objects(), access.cache(cache)
    config = _with_table(config, own, table)
    _bring_made(objects, own)
    try:
        found = prepare_search(config, own, progress, share=share)
    except Unshared as unshared:
        _publish_made(objects, own, [unshared.folder], progress)
        return unshared.parts
    sums = [name for name in objects.list(PREPARED) if ".parts/" in name]  # that have been added up
    list(objects.each(objects.delete, sums))
    if access.here:
        return found, None
    _publish_made(objects, own, _places(found), progress)
    return found, own


def prepare_part_there(
    config: SearchConfig,
    cache: Path,
    progress: Progress,
    *,
    access: Access,
    part: int,
    parts: int,
    table: str | None = None,
) -> None:
    """``prepare_part`` on any node, which publishes what it made for the one that goes on.

    Args:
        config, cache, progress, access, table: as for ``prepare_there``.
        part, parts: as for ``prepare_part``.
    """
    objects, own = access.objects(), access.cache(cache)
    config = _with_table(config, own, table)
    _bring_made(objects, own, "sources/")
    made = prepare_part(config, own, progress, part=part, parts=parts)
    _publish_made(objects, own, made, progress)
    for folder in made:
        if folder.is_dir():  # sums of a part, which are added up elsewhere
            shutil.rmtree(folder, ignore_errors=True)


def _with_table(config: SearchConfig, cache: Path, table: str | None) -> SearchConfig:
    """Let a configuration name a latency table that this node has; it is written where it is not there yet."""
    if table is None:
        return config
    file = cache / "tables" / f"{digest({'table': table})}.json"
    if not file.exists():
        make_folder(file.parent)
        write_text(file, table)
    return config.model_copy(update={"space": config.space.model_copy(update={"latency_table": str(file)})})


def _publish_made(objects: Objects, cache: Path, places: Iterable[Path], progress: Progress) -> None:
    """Publish files and folders of a cache under ``PREPARED``."""
    names = dict[str, Path]()
    for made in places:
        for file in [made] if made.is_file() else sorted(p for p in made.rglob("*") if p.is_file()):
            names[f"{PREPARED}{file.relative_to(cache).as_posix()}"] = file
    for done, _ in enumerate(objects.each(lambda name: objects.put(name, names[name]), names), 1):
        progress("publishing what was made", done / len(names), f"{done}/{len(names)} files")


def _bring_made(objects: Objects, cache: Path, below: str = "") -> list[str]:
    """Bring what ``_publish_made`` published below a folder and the cache has not; return all its names.

    What a name stands for never changes: it has a digest of all that it follows from.
    """
    names = list(objects.list(f"{PREPARED}{below}"))
    due = [name for name in names if not (cache / name.removeprefix(PREPARED)).exists()]
    for whole in (False, True):  # by the last ones a folder is known to be whole
        some = [name for name in due if name.endswith(WHOLE) == whole]
        list(objects.each(lambda name: objects.get(name, cache / name.removeprefix(PREPARED)), some))
    return names


def bring_prepared(objects: Objects, found: PreparedSearch, there: Path | None, cache: Path) -> PreparedSearch:
    """Bring what ``prepare_there`` made to the driver's cache.

    Args:
        objects: of the run.
        found, there: what it returned.
        cache: the driver's.
    """
    if there is None:
        list(objects.each(objects.delete, objects.list(PREPARED)))
        return found
    list(objects.each(objects.delete, _bring_made(objects, cache)))

    def moved(path: Path) -> Path:
        return cache / path.relative_to(there)

    return replace(
        found,
        folder=moved(found.folder),
        score_files={kind: moved(path) for kind, path in found.score_files.items()},
        proposals=tuple(map(moved, found.proposals)),
        teacher_logits=tuple(map(moved, found.teacher_logits)),
        subspaces=None if found.subspaces is None else moved(found.subspaces),
    )


def _places(found: PreparedSearch) -> list[Path]:
    further = [] if found.subspaces is None else [found.subspaces]
    return [found.folder, *found.score_files.values(), *found.proposals, *found.teacher_logits, *further]


def _trim(own: Path) -> None:
    """Remove this node's folders for other runs, the longest unused first, until the rest is within ``LIMIT``."""
    kept, used = [], 0
    for place in own.parent.parent.parent.glob("*/workers/*"):
        if place != own and place.is_dir():
            with contextlib.suppress(OSError):
                size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
                index = place.with_name(f".{place.name}.index")
                kept.append((index.stat().st_mtime if index.exists() else 0.0, size, place))
                used += size
    for last, size, place in sorted(kept):
        if used <= LIMIT or time.time() - last < UNUSED:
            return
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(place.with_name(f".{place.name}.index"))
        used -= size
