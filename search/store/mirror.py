"""A folder of this machine that holds what an object store has of a run, so that all else works on plain files.

Beside the folder ``NAME`` lie ``.NAME.url``, and ``.NAME.index``, what the store and the folder had of each file when
they were equal: a file that has changed since is news. Hidden files, links and a training's scratch stay here.
The journal of Optuna's study lies in the store in parts, ``.journal/GENERATION-OFFSET``, because it grows all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from prunesweep.models.errors import UserError
from prunesweep.models.io.files import publish_file, write_text
from prunesweep.models.io.objects import Objects, Stamp, joined
from prunesweep.models.io.provenance import digest

from .records import read_json

__all__ = ["Journal", "Mirror", "belongs_to", "place_for", "shown_place"]

JOURNAL, PARTS = "study.journal", ".journal/"
PART = re.compile(r"\.journal/(\d+)-(\d+)")
SCRATCH = re.compile(r"trials/[^/]+/(start|train|ray|made)(/|$)")  # checkpoints: another machine begins without them
LAST = ("result.json", "run.json", "promoted.json")  # by these others know that all the rest is there
AGAIN = 1.1  # seconds between two publications of one name: stores date them by the second


class Seen(NamedTuple):
    """A file when store and folder were equal; the store's stamp is not known of what this process published."""

    store: Stamp | None
    size: int
    changed: int


def place_for(url: str, kind: str = "runs") -> Path:
    """The folder of this machine's cache for what lies at a URL; those of one parent have one, and so one cache.

    Args:
        url: of the run.
        kind: ``runs`` for drivers, ``views`` for those who only look, ``workers`` for trials.
    """
    from prunesweep.training.data.index import cache_home

    place = url.partition("?")[0].rstrip("/")
    parent, _, name = place.rpartition("/")
    if not name or parent.endswith("/") or parent.endswith(":"):
        raise UserError(f"{url}: names no run: give one below a bucket, such as s3://bucket/runs/NAME")
    return cache_home("stores") / digest({"url": parent}) / kind / name


def belongs_to(path: Path) -> str | None:
    """The URL that a folder mirrors; None for other folders."""
    with contextlib.suppress(OSError, ValueError):  # the second one: of a path without a name, as / is
        return _beside(path, "url").read_text(encoding="utf-8")
    return None


def shown_place(path: Path) -> str:
    """A path as a user would give it: below a URL if it was brought from there."""
    for folder in (path, *path.parents):
        if (url := belongs_to(folder)) is not None:
            return url if folder == path else joined(url, path.relative_to(folder).as_posix())
    return str(path)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


class Mirror:
    """A folder, and the objects that it is to equal.

    Args:
        path: the folder.
        objects: the store's.
    """

    def __init__(self, path: Path, objects: Objects) -> None:
        self.path, self.objects = path, objects
        self.index = dict[str, Seen]()
        self.token = ""  # of the lease under which they were equal last
        self._put = dict[str, float]()
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            kept = read_json(_beside(path, "index"))
            self.token = str(kept["token"])
            for name, (store, size, changed) in kept["files"].items():
                self.index[name] = Seen(None if store is None else Stamp(*store), size, changed)

    def save(self) -> None:
        """Keep the index, and whose it is."""
        write_text(_beside(self.path, "url"), self.objects.url)
        write_text(_beside(self.path, "index"), json.dumps({"token": self.token, "files": dict(self.index)}))

    def clear(self) -> None:
        """Forget everything: the store has no such run."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.index.clear()
        _beside(self.path, "index").unlink(missing_ok=True)

    def files(self, below: str = "") -> dict[str, os.stat_result]:
        """The folder's own files by name, that belong into the store."""
        found = dict[str, os.stat_result]()
        for place, folders, names in os.walk(self.path / below):
            start = Path(place).relative_to(self.path)
            folders[:] = [one for one in folders if not _stays((start / one).as_posix())]
            for name in names:
                file = start / name
                if not _stays(file.as_posix()) and not (self.path / file).is_symlink():
                    with contextlib.suppress(FileNotFoundError):
                        found[file.as_posix()] = (self.path / file).stat()
        return found

    def is_news(self, name: str, own: os.stat_result) -> bool:
        """Whether a file is not as it was when store and folder were equal."""
        seen = self.index.get(name)
        return seen is None or (seen.size, seen.changed) != (own.st_size, own.st_mtime_ns)

    def pull(self, *, keep_news: bool = False, wanted: Callable[[str], bool] = lambda _: True, below: str = "") -> None:
        """Make the folder equal to the store.

        Args:
            keep_news: files that have changed here stay, and so do those that the store has not; else the store counts.
            wanted: whether a name is brought; others are left as they are.
            below: only names that begin with it, a folder's with its slash.
        """
        listed = self.objects.list(below)
        there = {name: stamp for name, stamp in listed.items() if not _stays(name) and wanted(name)}
        here = {name: own for name, own in self.files(below).items() if wanted(name)}
        due = list[str]()
        for name, stamp in there.items():
            seen, own = self.index.get(name), here.get(name)
            if own is None:
                due.append(name)
            elif keep_news and (self.is_news(name, own) or seen is None or seen.store is None):
                continue
            elif seen is None or seen.store != stamp or self.is_news(name, own):
                due.append(name)
        if not keep_news:
            for name in here.keys() - there.keys():
                (self.path / name).unlink(missing_ok=True)
                self.index.pop(name, None)
            _remove_empty(self.path / below)
        for name, _ in self.objects.each(lambda name: self._bring(name, there[name]), due):
            with contextlib.suppress(FileNotFoundError):
                own = (self.path / name).stat()
                self.index[name] = Seen(there[name], own.st_size, own.st_mtime_ns)
        journal = self.path / JOURNAL
        if not below and not (keep_news and journal.exists()):
            self._bring_journal(listed)

    def bring(self, names: Iterable[str]) -> None:
        """Bring some files, those that have changed in the store; what it has not goes here, too."""
        for name, stamp in list(self.objects.each(self.objects.stamp, names)):
            own, seen = self._stat(name), self.index.get(name)
            if stamp is None:
                (self.path / name).unlink(missing_ok=True)
            elif own is None or seen is None or seen.store != stamp or self.is_news(name, own):
                self._bring(name, stamp)
                if (own := self._stat(name)) is not None:
                    self.index[name] = Seen(stamp, own.st_size, own.st_mtime_ns)

    def _bring(self, name: str, stamp: Stamp) -> None:
        with contextlib.suppress(FileNotFoundError):  # a running search has just deleted it
            self.objects.get(name, self.path / name)
            if stamp.published:  # by it progress tells since when tasks run
                os.utime(self.path / name, ns=(stamp.published, stamp.published))

    def _bring_journal(self, listed: Iterable[str]) -> None:
        parts = _parts(listed)
        newest = max((generation for generation, offset, _ in parts if offset == 0), default=None)
        chain = [(offset, name) for generation, offset, name in parts if generation == newest]
        if not chain:
            (self.path / JOURNAL).unlink(missing_ok=True)
            return
        read = dict(self.objects.each(self.objects.read, [name for _, name in chain]))
        content = b""
        for offset, name in chain:
            if offset <= len(content):  # one that a merged part has in it already adds nothing
                content = content[:offset] + read[name] if offset + len(read[name]) > len(content) else content
        self.path.mkdir(parents=True, exist_ok=True)
        with publish_file(self.path / JOURNAL) as scratch:
            scratch.write_bytes(content)

    def push(self, names: Iterable[str]) -> None:
        """Publish those of some files that have changed; what others judge the rest by comes last."""
        due = [n for n in dict.fromkeys(names) if (own := self._stat(n)) is not None and self.is_news(n, own)]
        for some in (
            [n for n in due if n.rpartition("/")[2] not in LAST],
            [n for n in due if n.rpartition("/")[2] in LAST],
        ):
            for name, seen in self.objects.each(self._publish, some):
                if seen is not None:
                    self.index[name] = seen

    def _stat(self, name: str) -> os.stat_result | None:
        with contextlib.suppress(OSError):
            return (self.path / name).stat()
        return None

    def _publish(self, name: str) -> Seen | None:
        wait = self._put.get(name, -AGAIN) + AGAIN - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        with contextlib.suppress(FileNotFoundError):
            own = (self.path / name).stat()
            self.objects.put(name, self.path / name)
            self._put[name] = time.monotonic()
            return Seen(None, own.st_size, own.st_mtime_ns)
        return None

    def drop(self, below: str) -> None:
        """Delete from the store what the folder has no longer, of the names that begin with ``below``."""
        gone = [n for n in self.index if n.startswith(below) and not (self.path / n).is_file()]
        for name, _ in self.objects.each(self.objects.delete, gone):
            self.index.pop(name, None)

    def settle(self) -> None:
        """Note the store's stamps of all that was published, when nothing is published any more."""
        there = self.objects.list()
        for name, seen in self.index.items():
            if seen.store is None and name in there:
                self.index[name] = seen._replace(store=there[name])


class Journal:
    """Publishes what is appended to a journal. The parts of a long journal stay few, as neighbours are merged.

    Args:
        file: the journal.
        objects: the run's.
    """

    def __init__(self, file: Path, objects: Objects) -> None:
        self.file, self._objects = file, objects
        self._parts = list[tuple[int, int]]()  # offsets and sizes
        self._generation, self._inode, self._older = 0, 0, True

    def publish(self, end: int | None = None) -> None:
        """Publish what was appended, up to an offset."""
        try:
            with self.file.open("rb") as file:
                facts = os.fstat(file.fileno())
                end = facts.st_size if end is None else min(end, facts.st_size)
                known = sum(self._parts[-1]) if self._parts else 0
                if facts.st_ino != self._inode or end < known:  # written anew
                    if not self._generation:
                        self._generation = max((one for one, _, _ in _parts(self._objects.list(PARTS))), default=0)
                    self._generation += 1
                    self._inode, self._parts, self._older, known = facts.st_ino, [], True, 0
                if end == known:
                    return
                start, merged = known, 0
                while self._parts and self._parts[-1][1] <= end - start:
                    start, _ = self._parts.pop()
                    merged += 1
                file.seek(start)
                self._objects.write(self._part(start), file.read(end - start))
        except FileNotFoundError:
            return
        self._parts.append((start, end - start))
        if merged > 1 or self._older:
            keep = {self._part(offset) for offset, _ in self._parts}
            for name in self._objects.list(PARTS):
                if name not in keep:
                    self._objects.delete(name)
        self._older = False

    def _part(self, offset: int) -> str:
        return f"{PARTS}{self._generation}-{offset:012d}"


def _parts(names: Iterable[str]) -> list[tuple[int, int, str]]:
    """Generation, offset and name of the parts of a journal, in this order."""
    return sorted((int(m[1]), int(m[2]), m[0]) for m in map(PART.fullmatch, names) if m)


def _stays(name: str) -> bool:
    """Whether a file or folder stays on this machine, or has its own way to the store."""
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return hidden or parts[0] == "front" or name.startswith(JOURNAL) or SCRATCH.match(name) is not None


def _remove_empty(folder: Path) -> None:
    """Remove folders without files: a store has none."""
    for place, _, _ in os.walk(folder, topdown=False):
        if place != str(folder):
            with contextlib.suppress(OSError):
                os.rmdir(place)
