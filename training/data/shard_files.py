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
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from prunesweep.models import UserError
from prunesweep.models.errors import NotHere
from prunesweep.models.io.files import make_folder, publish_file

from .images import is_hidden
from .index import cache_home, stamp_of

__all__ = ["LIMIT", "LocalShards", "RemoteShards", "ShardFiles", "is_url", "shard_files"]

LIMIT = "PRUNESWEEP_SHARD_CACHE_GIB"  # environment variable: most space of kept shards on this machine
SHARE = 0.5  # of the free space, where it is not set
WAITS = (1, 2, 4, 8, 15, 30, 60)  # seconds between attempts while a store does not answer
READS_TO_KEEP = 8  # single images read from a shard before all of it is fetched
CHUNK = 2**23  # bytes
Found = TypeVar("Found")


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


def is_url(place: str) -> bool:
    """Return whether a place is a URL, not a path."""
    return "://" in place


def shard_files(place: str) -> ShardFiles:
    """Return the shards of a place: an absolute path, or a URL."""
    return RemoteShards(place) if is_url(place) else LocalShards(place)


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
        place: the URL of their folder, with what pyarrow understands (``?endpoint_override=...``).

    Raises:
        UserError: the URL is of no known kind, or ``LIMIT`` is not a number.
        NotHere: the store cannot be reached, or refuses.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.cache = cache_home("shards") / hashlib.sha256(place.encode()).hexdigest()[:16]
        self.reads = Counter[str]()
        _limit()
        self.sizes = self._answer(self._list, WAITS[:2])  # size and time of the last change (ns) by name
        for name in self.sizes:
            with contextlib.suppress(OSError):
                os.utime(self._kept(name))  # in use, so others go first

    def __str__(self) -> str:
        return self.place

    def names(self, split: str) -> list[str]:
        return sorted(name for name in self.sizes if name.startswith(split))

    def stamp(self, name: str) -> list[int]:
        size, changed = self.sizes[name]
        return [0, changed, changed, size]

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[IO[bytes]]:
        kept = self._fetched(name)
        if kept is not None:
            with kept.open("rb") as file:
                yield file
            return
        with self._answer(lambda: _opened(self.place)[0].open_input_stream(self._path(name))) as stream:
            yield stream

    def read(self, name: str, position: int, size: int) -> bytes:
        with contextlib.suppress(FileNotFoundError):  # not kept, or gone since to make room
            return _part(self._kept(name), position, size)
        self.reads[name] += 1
        if self.reads[name] == READS_TO_KEEP and (kept := self._fetched(name)) is not None:
            return _part(kept, position, size)
        return self._answer(lambda: self._range(name, position, size))

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a cache that cannot be written: nothing is kept, nothing to wait for
                make_folder(self.cache)
                file = stack.enter_context((self.cache / "lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, name: str) -> str:
        return f"{_opened(self.place)[1].rstrip('/')}/{name}"

    def _kept(self, name: str) -> Path:
        size, changed = self.sizes[name]
        return self.cache / f"{changed}-{size}-{name}"

    def _list(self) -> dict[str, tuple[int, int]]:
        from pyarrow.fs import FileSelector  # type: ignore[import-untyped]

        system, path = _opened(self.place)
        found = system.get_file_info(FileSelector(path, allow_not_found=True))
        tars = [info for info in found if info.is_file and info.base_name.endswith(".tar")]
        return {info.base_name: (info.size, info.mtime_ns or 0) for info in tars if not is_hidden(info.base_name)}

    def _range(self, name: str, position: int, size: int) -> bytes:
        with _opened(self.place)[0].open_input_file(self._path(name)) as file:
            return bytes(file.read_at(size, position))

    def _fetched(self, name: str) -> Path | None:
        """Return the kept file of a shard, fetched if need be; None where there is no room."""
        kept = self._kept(name)
        if kept.is_file():
            return kept
        try:
            make_folder(self.cache)
            if not _room(self.cache, self.sizes[name][0]):
                return None
            with publish_file(kept) as scratch:
                self._answer(lambda: self._download(name, scratch))
        except OSError:  # the disk is full, or may not be written
            return None
        return kept

    def _download(self, name: str, scratch: Path) -> None:
        with _opened(self.place)[0].open_input_stream(self._path(name)) as stream, scratch.open("wb") as file:
            try:
                shutil.copyfileobj(stream, file, CHUNK)
            except OSError as error:
                if error.filename is not None or error.errno is not None:
                    raise _Here(*error.args) from error
                raise

    def _answer(self, ask: Callable[[], Found], waits: Sequence[int] = WAITS) -> Found:
        """Ask the store, for some two minutes while it fails.

        A store that does not answer must not look like an image that cannot be read, which training would replace.
        """
        for wait in (*waits, None):
            try:
                return ask()
            except _Here:
                raise
            except FileNotFoundError as error:
                raise NotHere(f"data 'wds:{self.place}': {error}; was it deleted?") from error
            except OSError as error:
                reason = str(error).splitlines()[0]
                if wait is None or _refused(reason):
                    raise NotHere(
                        f"data 'wds:{self.place}': the store does not give it: {reason}\nCheck the URL, the network "
                        "and the credentials (for s3:// those of the AWS command line, or anonymous@ in front of the "
                        "bucket for none)"
                    ) from error
                print(f"{self.place} does not answer ({reason[:60]}), again in {wait} s", file=sys.stderr, flush=True)
                time.sleep(wait)
        raise AssertionError


class _Here(OSError):
    """A failure of this machine's disk, not of the store."""


def _refused(reason: str) -> bool:
    """Whether asking again is in vain."""
    return any(word in reason for word in ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "HTTP status 403"))


def _part(file: Path, position: int, size: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(position)
        return opened.read(size)


def _opened(place: str) -> Any:
    """Return pyarrow's file system of a URL and the path in it; one connection for each process."""
    return _connect(place, os.getpid())


@functools.lru_cache(maxsize=8)
def _connect(place: str, _: int) -> Any:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow.fs import FileSystem  # type: ignore[import-untyped]

    try:
        return FileSystem.from_uri(place)
    except pyarrow.ArrowInvalid as error:
        kinds = "s3://, gs://, abfs://, hdfs:// or file://"
        raise UserError(f"data 'wds:{place}': must be a path, or a URL with {kinds}: {error}") from error


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
