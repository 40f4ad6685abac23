"""A run on an object store: a driver's, which works in a mirror and publishes what changes, and that of who looks.

What a trial has made is published before its ``result.json``, and that before the study hears more of it, so whoever
finds the store at any moment finds a run that a resume goes on with. A driver that was killed with finished work that
is not in the store yet publishes it when it is resumed on the same machine, unless another one has gone on meanwhile;
from another machine those trials are done again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunesweep.models.errors import UserError
from prunesweep.models.io.lock import Lost
from prunesweep.models.io.objects import Objects, StoreFails, is_url, local_path, url_of

from .lease import LEASES, Lease, holder
from .mirror import JOURNAL, Journal, Mirror, place_for
from .progress import BEGUN
from .run import Result, Run, Task, place_of, task_id

if TYPE_CHECKING:
    from prunesweep.search.execution.coordinator import Coordinator

__all__ = ["PREPARED", "STATE", "STOPPING", "TRAINING", "WORKERS", "StoredRun", "ask_to_stop", "bring_shown", "view"]

LOOK, REST, STATE = 1.0, 10.0, 30.0  # seconds between publications of results, of reports and logs, of states
PREPARED = ".prepared/"  # objects that a driver makes a run of
WORKERS = ".workers"  # folder of what Ray Train keeps of workers of trials
MAKING = ".making"  # object of a run that is not there yet with all of its files
STOP, STOPPING = ".stop", ".stopping"  # objects: a search is asked to stop; its trials are
TRAINING = "state.safetensors"
HANDED = "handed.json"  # what a trial gave on a node, until the driver has taken it


class StoredRun:
    """A run that this process works on, for the time of a ``with`` block.

    Args:
        url: of the run.
        note: is told, in a line for people, what of the store takes long.
        on_lost: called, in a thread, where another process has taken over; nothing is published any more.
        new: there must be no run yet; otherwise there must be one.

    Attributes:
        path: the folder that all work is done in.
        elsewhere: whether trials are done on nodes that do not see it.

    Raises:
        UserError: the store cannot be used, another process works on the run, or it is there, or is not.
    """

    def __init__(self, url: str, note: Callable[[str], None], on_lost: Callable[[Lost], object], *, new: bool) -> None:
        self.url, self.path, self._note, self._new = url, place_for(url), note, new
        self._objects = Objects(url, note)
        self._mirror = Mirror(self.path, self._objects)
        self._lease = Lease(url, note, on_lost)
        self._objects.guard = self._lease.check
        self._journal = Journal(self.path / JOURNAL, self._objects)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._work = threading.Lock()  # held while something is published
        self._stopping = self.elsewhere = False
        self._settled, self._due = 0, dict[str, float]()
        self._open, self._models = set[str](), set[str]()

    def __enter__(self) -> StoredRun:
        self._lease.__enter__()
        try:
            self._open_mirror()
        except BaseException:
            self._lease.release(forget=self._lease.before == 0)
            raise
        return self

    def _open_mirror(self) -> None:
        there = self._objects.stamp("run.json") is not None or self._objects.stamp("search.toml") is not None
        if self._new and there:
            raise UserError(
                f"{self.url} exists: go on with 'prunesweep resume {self.url}', or choose another place with --out"
            )
        if not self._new and not there:
            raise UserError(
                f"{self.url} is not a run: search.toml and run.json are missing. A run is made by 'prunesweep search'"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._new:
            self._clear()
        else:
            own = self._mirror.token == str(self._lease.before) and self.path.is_dir()
            self._mirror.pull(keep_news=own)
            for name in (STOP, STOPPING):
                self._objects.delete(name)
            self._objects.delete_folder(WORKERS)
        self._mirror.token = str(self._lease.number)
        self._mirror.save()
        if not self._new:
            self.publish()

    def _clear(self) -> None:
        """Make room for a new run: what one that was not made to its end has left goes, and nothing else.

        Raises:
            UserError: something else is there.
        """
        left = [name for name in self._objects.list() if not name.startswith((LEASES, PREPARED))]
        if left and MAKING not in left:
            raise UserError(
                f"{self.url} is not empty: {left[0]} is there, and no run. Choose another place with --out, or delete "
                "what is there"
            )
        if left:
            self._note(f"{self.url}: {len(left)} objects of a search that was not begun are deleted")
        list(self._objects.each(self._objects.delete, [name for name in left if name != MAKING]))
        self._mirror.clear()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def publish(self) -> None:
        """Publish everything that has changed."""
        with self._work:
            if self._new:
                self._objects.write(MAKING, b"")
            self._mirror.push(self._mirror.files())
            self._journal.publish()
            if self._new:
                self._objects.delete(MAKING)
                self._new = False
            self._mirror.save()

    @property
    def number(self) -> int:
        """Of the lease."""
        return self._lease.number

    @property
    def objects(self) -> Objects:
        """The run's; nothing is published by them once another process has taken over."""
        return self._objects

    def take(self, unit: str, found: Mapping[str, Any]) -> None:
        """Take over what a trial gave on a node that does not see the folder.

        Args:
            unit: its name.
            found: what its ``result.json`` is to say.
        """
        with self._work:
            self._mirror.pull(below=f"trials/{unit}/", keep_news=True)
            self._mirror.pull(below=f"tb/trial-{place_of(unit)[1]:04d}/", keep_news=True)
        if found["state"] in ("finished", "failed"):
            own = Result(**found["result"]) if found["state"] == "finished" else None
            Run(self.path).write_result(unit, result=own, error=found.get("error"))
            (Run(self.path).trial(unit) / HANDED).unlink(missing_ok=True)

    def files_of(self, task: Task) -> dict[str, str]:
        """The small files that a trial needs, by name: its decision, its task, and the results of the rungs below."""
        folders = [f"trials/{task_id(task.number, rung)}" for rung in range(task.rung + 1)]
        names = [f"{folder}/{name}" for folder in folders for name in ("cut.json", "spec.json", "result.json")]
        files = {name: self.path / name for name in names}
        return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}

    def follow(self, coordinator: Coordinator) -> None:
        """Publish what trials give from now on, in a thread, and stop the search where the store has been asked to."""
        self._settled = coordinator.settled
        self._thread = threading.Thread(target=self._follow, args=(coordinator,), daemon=True, name="publisher")
        self._thread.start()

    def close(self, error: BaseException | None = None) -> None:
        """Publish all that is left, and let others in.

        Raises:
            StoreFails: the store does not answer, and no other error is on its way.
        """
        if self._over.is_set():
            return
        self._over.set()
        try:
            if self._thread is not None:
                self._thread.join()
            if self.path.is_dir() and (self.path / "run.json").exists():
                self.publish()
                with self._work:
                    self._objects.delete_folder(WORKERS)
                    self._mirror.drop("trials/")
                    self._mirror.settle()
                    self._mirror.save()
        except Lost:
            pass
        except UserError as failure:
            text = (
                f"{failure}\nWhat is not published yet lies in {self.path}: 'prunesweep resume {self.url}' on this "
                "machine publishes it"
            )
            if error is None:
                raise StoreFails(text) from failure
            self._note(text)
        finally:
            self._lease.release(forget=self._new)

    def _follow(self, coordinator: Coordinator) -> None:
        while not self._over.wait(LOOK):
            try:
                with self._work:
                    self._look(coordinator)
            except Lost:
                return
            except UserError as failure:  # said again at the end, where it stays
                self._note(f"{failure}; tried again")
            except OSError:  # a file that went away, or a full disk, which the search meets by itself
                continue

    def _look(self, coordinator: Coordinator) -> None:
        """Publish trials that have ended, then the journal as it was before, then from time to time the rest."""
        journal = self.path / JOURNAL  # which a search with its study in a database has not
        end = journal.stat().st_size if journal.is_file() else None
        self._open |= set(coordinator.handed_out)
        ended = {unit for unit in self._open if (self.path / "trials" / unit / "result.json").is_file()}
        if coordinator.settled != self._settled:
            self._settled = coordinator.settled
            names = {result.id for result in list(coordinator.results)} | set(coordinator.failures)
            ended |= {n for n in names if self._mirror.index.get(f"trials/{n}/result.json") is None}
        for unit in sorted(ended):
            self._publish_unit(unit)
            self._open.discard(unit)
            if (self.path / "trials" / unit / "model").is_dir():
                self._models.add(unit)
        if gone := {unit for unit in self._models if not (self.path / "trials" / unit / "model").is_dir()}:
            self._mirror.push(["front.json"])  # first, so that nobody misses what it names
            for unit in gone:
                self._mirror.drop(f"trials/{unit}/")
            self._models -= gone
        self._journal.publish(end)
        if coordinator.stopping and not self._stopping:
            self._objects.write(STOPPING, b"")
            self._stopping = True
        if self._is_due("rest", REST):
            self._mirror.push(path.name for path in self.path.iterdir() if path.is_file() and path.name in TOP)
            self._mirror.push(self._mirror.files("tb/search"))
            for unit in sorted(self._open):
                if self.elsewhere:
                    self._mirror.pull(keep_news=True, wanted=lambda n: n.endswith(TOLD), below=f"trials/{unit}/")
                self._publish_unit(unit, state=self._is_due(unit, STATE))
            if self._objects.stamp(STOP) is not None:
                self._objects.delete(STOP)
                self._note("asked to stop: the running trials save their state")
                coordinator.stop()
        if self._is_due("index", 60.0):
            self._mirror.save()

    def _is_due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._due.setdefault(what, now + seconds):
            return False
        self._due[what] = now + seconds
        return True

    def _publish_unit(self, unit: str, *, state: bool = True) -> None:
        names = [*self._mirror.files(f"trials/{unit}"), *self._mirror.files(f"tb/trial-{place_of(unit)[1]:04d}")]
        self._mirror.push(name for name in names if state or not name.endswith(TRAINING))
        self._mirror.drop(f"trials/{unit}/")


TOLD = ("/metrics.jsonl", f"/{BEGUN}")  # files of a trial that say how far it is
TOP = ("front.json", "report.html", "search.toml", "run.json", "advice.json", "speed.json", "study.json")


def view(place: str | Path, *, whole: bool = True) -> Path:
    """A folder of this machine with what the store has of a run, or a saved model, now; other places as they are.

    Only what has changed since the last time is brought. Nothing in the store changes.

    Args:
        place: a URL, or a folder.
        whole: all of it; otherwise what shows how a search goes, with no models but the front's.

    Raises:
        UserError: the store cannot be used, or has nothing there.
    """
    url = url_of(place)
    if not is_url(url):
        return local_path(place)
    objects = Objects(url)
    objects.check()
    path = place_for(url, "views")
    path.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(path, objects)
    if whole:
        mirror.pull()
    else:
        bring_shown(mirror)
    mirror.save()
    if not mirror.index:
        raise UserError(f"{url}: nothing is there")
    run = Run(path)
    for old in run.leases.glob("*"):
        old.unlink()
    if (found := holder(objects)) is not None:  # so that it is seen as a folder's driver is
        facts, age = found
        run.leases.mkdir(exist_ok=True)
        lease = run.leases / f"{1:09d}"
        lease.write_text(json.dumps(facts))
        os.utime(lease, (time.time() - max(age, 0.0),) * 2)
    return path


def bring_shown(mirror: Mirror, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Bring what shows how a search goes, with no models but the front's; of that what is ``wanted``, by its name."""
    mirror.bring(["front.json"])
    front = {task_id(*member) for member in Run(mirror.path).listed()}
    mirror.pull(wanted=lambda name: _shows(name, front) and wanted(name))


def _shows(name: str, front: set[str]) -> bool:
    """Whether a file is needed by who looks how a search goes."""
    parts = name.split("/")
    if parts[0] in ("teacher_logits", "tb") or parts[-1] == TRAINING:
        return False
    return not (parts[0] == "trials" and len(parts) > 3) or parts[1] in front


def ask_to_stop(url: str) -> bool:
    """Ask the driver of a run to stop; whether one lives. Raises UserError where the store cannot be used."""
    objects = Objects(url)
    objects.check()
    if holder(objects) is None:
        return False
    objects.write(STOP, b"")
    return True
