"""The files of webdataset shards, in a folder or at a URL that pyarrow opens, with a cache on this machine.

Shards at a URL (``s3://bucket/prefix``, ``gs://``, ``abfs://``, ``hdfs://``, ``file://``) are read once from beginning
to end to find their images, and kept in the user's cache on the way, as far as ``PRUNESWEEP_SHARD_CACHE_GIB`` allows.
Images of kept shards are read from there, all others by range requests. Which images an epoch has, and their order,
does not depend on what is kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from prunesweep.models import UserError
from prunesweep.models.errors import NotHere
from prunesweep.models.io.files import make_folder
from prunesweep.models.io.objects import Objects

from .images import is_hidden
from .index import cache_home, stamp_of

__all__ = ["LIMIT", "LocalShards", "RemoteShards", "ShardFiles", "shard_files"]

LIMIT = "PRUNESWEEP_SHARD_CACHE_GIB"  # environment variable: most space of kept shards on this machine
SHARE = 0.5  # of the free space, where it is not set
READS_TO_KEEP = 8  # single images read from a shard before all of it is fetched


class ShardFiles(Protocol):
    """Shards of one place. Objects of a class can be sent to other processes."""

    def names(self, split: str) -> list[str]:
        """Return the names of ``SPLIT*.tar``, sorted."""

    def stamp(self, name: str) -> list[int]:
        """Return numbers that change when the shard does; times of changes (ns) are the second and the third."""

    def whole(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open a shard to read it once, from beginning to end."""

    def read(self, name: str, position: int, size: int) -> bytes:
        """Return a part of a shard."""

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes of this machine from reading all shards at the same time."""


def shard_files(place: str) -> ShardFiles:
    """Return the shards of a place: an absolute path, or a URL."""
    return RemoteShards(place) if "://" in place else LocalShards(place)


class LocalShards:
    """Shards in a folder of this machine, or one that it mounts."""

    def __init__(self, place: str) -> None:
        self.folder = Path(place)

    def __str__(self) -> str:
        return str(self.folder)

    def names(self, split: str) -> list[str]:
        return [file.name for file in sorted(self.folder.glob(f"{split}*.tar")) if not is_hidden(file.name)]

    def stamp(self, name: str) -> list[int]:
        return list(stamp_of(self.folder / name))

    def whole(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return (self.folder / name).open("rb")

    def read(self, name: str, position: int, size: int) -> bytes:
        return _part(self.folder / name, position, size)

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class RemoteShards:
    """Shards at a URL, each kept on this machine once it was read whole, as far as there is room.

    Args:
        place: the URL of their folder.

    Raises:
        UserError: nothing opens such a URL, the store refuses, or ``LIMIT`` is not a number.
        NotHere: the store does not answer.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.cache = cache_home("shards") / hashlib.sha256(place.encode()).hexdigest()[:16]
        self.reads = Counter[str]()
        _limit()
        found = self._store.list()
        self.stamps = {name: found[name] for name in found if name.endswith(".tar") and _is_plain(name)}
        for name in self.stamps:
            with contextlib.suppress(OSError):
                os.utime(self._kept(name))  # in use, so others go first

    def __str__(self) -> str:
        return self.place

    def names(self, split: str) -> list[str]:
        return sorted(name for name in self.stamps if name.startswith(split))

    def stamp(self, name: str) -> list[int]:
        size, changed = self.stamps[name]
        return [0, changed, changed, size]

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[IO[bytes]]:
        kept = self._fetched(name)
        with self._there(name), self._store.stream(name) if kept is None else kept.open("rb") as file:
            yield file

    def read(self, name: str, position: int, size: int) -> bytes:
        with contextlib.suppress(FileNotFoundError):  # not kept, or gone since to make room
            return _part(self._kept(name), position, size)
        self.reads[name] += 1
        if self.reads[name] == READS_TO_KEEP and (kept := self._fetched(name)) is not None:
            return _part(kept, position, size)
        with self._there(name):
            return self._store.part(name, position, size)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a cache that cannot be written: nothing is kept, nothing to wait for
                make_folder(self.cache)
                file = stack.enter_context((self.cache / "lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def _store(self) -> Objects:
        return _objects(self.place, os.getpid())

    @contextlib.contextmanager
    def _there(self, name: str) -> Iterator[None]:
        """Say it where a shard is gone, which must not look like an image that cannot be read."""
        try:
            yield
        except FileNotFoundError as error:
            raise NotHere(f"data 'wds:{self.place}': {name} is gone") from error

    def _kept(self, name: str) -> Path:
        size, changed = self.stamps[name]
        return self.cache / f"{changed}-{size}-{name}"

    def _fetched(self, name: str) -> Path | None:
        """Return the kept file of a shard, fetched if need be; None where there is no room."""
        kept = self._kept(name)
        if kept.is_file():
            return kept
        try:
            make_folder(self.cache)
            if not _room(self.cache, self.stamps[name].size):
                return None
            with self._there(name):
                self._store.get(name, kept)
        except OSError:  # the disk is full, or may not be written
            return None
        return kept


def _is_plain(name: str) -> bool:
    return "/" not in name and not is_hidden(name)


@functools.lru_cache(maxsize=8)
def _objects(place: str, _: int) -> Objects:
    """Return what opens a URL; one connection for each process."""
    return Objects(place, lambda line: print(f"data: {line}", file=sys.stderr, flush=True))


def _part(file: Path, position: int, size: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(position)
        return opened.read(size)


def _limit() -> int | None:
    """Return the most bytes of kept shards; None where the variable is not set."""
    given = os.environ.get(LIMIT)
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise UserError(f"{LIMIT} = {given!r}: must be a number of GiB from 0 on, for shards kept on this machine")
    return int(number * 2**30)


def _room(cache: Path, size: int) -> bool:
    """Make room for a file in ``cache``; False where there is none. Shards of other data go first, the oldest first."""
    kept = [(info.stat(), info) for info in cache.parent.glob("*/*.tar")]
    used, free = sum(stat.st_size for stat, _ in kept), shutil.disk_usage(cache).free
    limit = _limit()
    most = int(SHARE * (free + used)) if limit is None else limit
    if size > most:
        return False
    others = sorted(((stat.st_mtime, stat.st_size, file) for stat, file in kept if file.parent != cache))
    while used + size > most or size > free:
        if not others:
            return False
        _, gone, file = others.pop(0)
        file.unlink(missing_ok=True)
        used, free = used - gone, free + gone
    return True
