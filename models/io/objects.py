"""A folder of an object store: list, read, publish and delete its files, whatever pyarrow or fsspec opens.

An object appears whole or not at all. A store that does not answer, or answers with an error of its own, is asked again
for minutes; who waits is told so once, and once when it is over.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from prunesweep.models.errors import NotHere, UserError

from .files import disk_full, publish_file

__all__ = ["Objects", "Stamp", "StoreFails", "is_url", "joined", "local_path", "url_of"]

T = TypeVar("T")

URL = re.compile(r"[a-z][a-z0-9+.-]+://")
COLLAPSED = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])")  # what a Path makes of a URL
PATIENCE, FIRST = 600.0, 20.0  # seconds that a store is asked again, and so when it has not answered yet
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds between two questions, the last one again and again
TOLD = 3.0  # seconds of trouble that are worth a line
TOGETHER = 8  # transfers side by side
BLOCK = 8 * 2**20  # bytes
NOT_ATOMIC = ("local", "hdfs", "viewfs")  # file systems where a file is seen while it is written
FINAL = {  # what no further question changes, as stores say it
    "NO_SUCH_BUCKET": "there is no such bucket; make it first",
    "NoSuchBucket": "there is no such bucket; make it first",
    "ACCESS_DENIED": "these credentials may not do that",
    "AccessDenied": "these credentials may not do that",
    "INVALID_ACCESS_KEY_ID": "the store does not know the access key",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is not that of the access key",
    "INVALID_CLIENT_TOKEN_ID": "the store does not know the access key",
    "EXPIRED_TOKEN": "the credentials have expired; renew them",
    "MISSING_AUTHENTICATION_TOKEN": "there are no credentials",
}
CREDENTIALS = {  # where they come from
    "s3": "credentials and endpoint are read as pyarrow does: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, "
    "AWS_ENDPOINT_URL for stores that are not Amazon's",
    "gs": "credentials are Google's application default ones",
    "abfs": "credentials are those of Azure's default chain",
    "hdfs": "it takes Hadoop's client: JAVA_HOME, HADOOP_HOME and CLASSPATH",
}


class StoreFails(NotHere):
    """A store did not do what it was asked for, however often."""


class Stamp(NamedTuple):
    """Size in bytes of an object, and when it was published, in nanoseconds since 1970 by the store's clock."""

    size: int
    published: int


def is_url(place: str | Path) -> bool:
    """Whether a place is one of an object store: ``s3://bucket/run``. ``file://`` is a folder like others."""
    text = url_of(place)
    return URL.match(text) is not None and not text.startswith("file:")


def url_of(place: str | Path) -> str:
    """The URL that a place was given as, though a ``Path`` was made of it; other places as they are."""
    return COLLAPSED.sub(r"\1://", str(place), count=1) if isinstance(place, Path) else place


def local_path(place: str | Path) -> Path:
    """The folder that a ``file://`` URL or a path means."""
    text = str(place)
    found = re.match(r"file:/+", text)
    return Path(place) if found is None else Path("/" + unquote(text[found.end() :]))


def joined(url: str, name: str) -> str:
    """The URL of something below a URL; options after ``?`` stay."""
    place, mark, options = url.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


class Objects:
    """The objects below a URL, by their names relative to it.

    Args:
        url: ``s3://``, ``gs://``, ``abfs://``, ``hdfs://``, or another scheme that fsspec opens.
        note: is told, in a line for people, when the store does not answer and when it does again.
        known: it has answered to another process, so it is asked for minutes from the first question on; else an
            endpoint that is not there is told of within seconds.

    Attributes:
        guard: called before every attempt to change something; what it raises ends the attempts.

    Raises:
        UserError: nothing opens such a URL.
    """

    def __init__(self, url: str, note: Callable[[str], None] = warnings.warn, *, known: bool = False) -> None:
        self.url, self.note = url, note
        self.guard: Callable[[], object] = lambda: None
        self._files, self._base = _open(url)
        self._answered = known
        self._troubled = 0  # threads that wait
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._base.rstrip("/").rpartition("/")[2]

    @property
    def opened(self) -> tuple[Any, str]:
        """Pyarrow's file system, and the place in it, for libraries that write below the URL by themselves."""
        return self._files, self._base

    def check(self) -> None:
        """Raise UserError where the bucket is not there, or its content may not be listed."""
        from pyarrow.fs import FileType  # type: ignore[import-untyped]

        bucket = self._base.split("/")[0]
        if self.list(".lease/") or not bucket:
            return
        try:
            there = self.asked(lambda: self._files.get_file_info(bucket)).type != FileType.NotFound
        except StoreFails:
            raise
        except UserError:  # who may not look at the whole bucket may use this place all the same
            return
        if not there:
            raise UserError(f"{self.url}: {FINAL['NO_SUCH_BUCKET']} ({bucket})")

    def list(self, below: str = "") -> dict[str, Stamp]:
        """All objects whose names begin with ``below``, which is empty or ends with a slash."""
        from pyarrow.fs import FileSelector, FileType

        place = f"{self._base}/{below}".rstrip("/")
        wanted = FileSelector(place, recursive=True, allow_not_found=True)
        found = self.asked(lambda: self._files.get_file_info(wanted))
        start = len(self._base) + 1
        return {
            info.path[start:]: Stamp(info.size or 0, info.mtime_ns or 0) for info in found if info.type == FileType.File
        }

    def stamp(self, name: str) -> Stamp | None:
        """The stamp of one object; None where it is not there."""
        from pyarrow.fs import FileType

        info = self.asked(lambda: self._files.get_file_info(self._path(name)))
        return Stamp(info.size or 0, info.mtime_ns or 0) if info.type == FileType.File else None

    def read(self, name: str) -> bytes:
        """The content of an object. Raises FileNotFoundError where it is not there."""

        def look() -> bytes:
            with self._files.open_input_stream(self._path(name)) as file:
                return file.read()

        return self.asked(look)

    def part(self, name: str, position: int, size: int) -> bytes:
        """Return ``size`` bytes of an object from ``position`` on. Raises FileNotFoundError where it is not there."""

        def look() -> bytes:
            with self._files.open_input_file(self._path(name)) as file:
                return bytes(file.read_at(size, position))

        return self.asked(look)

    def stream(self, name: str) -> Any:
        """Open an object to read it once, from beginning to end; what fails on the way is an OSError."""
        return self.asked(lambda: self._files.open_input_stream(self._path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Publish an object, which replaces one of this name."""

        def publish() -> None:
            self.guard()
            self._publish(name, [content])

        self.asked(publish)

    def put(self, name: str, file: Path) -> None:
        """Publish a file as an object. Raises FileNotFoundError where it is gone."""

        def publish() -> None:
            self.guard()
            with file.open("rb") as opened:
                self._publish(name, iter(lambda: opened.read(BLOCK), b""))

        self.asked(publish)

    def get(self, name: str, file: Path) -> None:
        """Bring an object, in one step, to a file, whose time is that of the object's publication afterwards."""

        def bring() -> None:
            with (
                self._files.open_input_stream(self._path(name)) as source,
                publish_file(file) as scratch,
                scratch.open("wb") as target,
            ):
                while block := source.read(BLOCK):
                    target.write(block)

        file.parent.mkdir(parents=True, exist_ok=True)
        self.asked(bring)

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""

        def delete() -> None:
            self.guard()
            self._files.delete_file(self._path(name))

        with contextlib.suppress(FileNotFoundError):
            self.asked(delete)

    def delete_folder(self, name: str) -> None:
        """Delete all that lies below a name, and what file systems keep of folders, if it is there."""

        from pyarrow.fs import FileType

        def delete() -> None:
            self.guard()
            if self._files.get_file_info(self._path(name)).type != FileType.NotFound:  # not all say it by their error
                self._files.delete_dir(self._path(name))

        with contextlib.suppress(FileNotFoundError):
            self.asked(delete)

    def each(self, act: Callable[[str], T], names: Iterable[str]) -> Iterator[tuple[str, T]]:
        """Call ``act`` for names, several at a time, and yield what it returns as it comes."""
        with ThreadPoolExecutor(TOGETHER) as pool:
            yield from ((name, found) for name, found in pool.map(lambda name: (name, act(name)), names))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _publish(self, name: str, content: Iterable[bytes]) -> None:
        path = self._path(name)
        own = getattr(self._files, "type_name", "") in NOT_ATOMIC
        target = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp" if own else path
        if own:
            self._files.create_dir(path.rpartition("/")[0], recursive=True)
        with self._files.open_output_stream(target) as file:
            for block in content:
                file.write(block)
        if own:
            self._files.move(target, path)

    def asked(self, ask: Callable[[], T]) -> T:
        """Return what ``ask`` gives, asked again where the store fails.

        Raises:
            FileNotFoundError: there is no such object.
            UserError: the store refuses, for a reason that stays.
            StoreFails: it has not answered for minutes.
        """
        from pyarrow import ArrowException  # type: ignore[import-untyped]

        begun, told = time.monotonic(), False
        for turn in range(10**9):
            try:
                found = ask()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.filename is not None or disk_full(error):
                    raise  # of this machine
                if reason := _final(error):
                    raise UserError(f"{self.url}: {reason}; {_help(self.url)}: {_short(error)}") from error
                waited = time.monotonic() - begun
                if waited > (PATIENCE if self._answered else FIRST):
                    raise StoreFails(
                        f"{self.url}: the store has not answered for {waited:.0f} s; {_help(self.url)}: {_short(error)}"
                    ) from error
                if waited > TOLD and not told:
                    told = True
                    self._trouble(1, f"{self.url} does not answer ({_short(error)}); asked again until it does")
                time.sleep(PAUSES[min(turn, len(PAUSES) - 1)])
            except ArrowException as error:  # such as of credentials that may not travel without TLS
                raise UserError(f"{self.url} cannot be used: {_short(error)}; {_help(self.url)}") from error
            else:
                self._answered = True
                if told:
                    self._trouble(-1, f"{self.url} answers again")
                return found
        raise AssertionError

    def _trouble(self, more: int, text: str) -> None:
        """Count who waits; only the first one says so, and the last one that it is over."""
        with self._lock:
            self._troubled += more
            if self._troubled == (1 if more > 0 else 0):
                self.note(text)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    scheme = urlsplit(url).scheme
    wanted = url
    if scheme == "s3" and "allow_delayed_open" not in url:  # small objects in one request, not three
        wanted = f"{url}{'&' if '?' in url else '?'}allow_delayed_open=true"
    try:
        files, base = FileSystem.from_uri(wanted)
        return files, base.rstrip("/")
    except (ArrowException, OSError, ValueError) as error:
        if "Unrecognized filesystem type" not in str(error):
            raise UserError(f"{url} cannot be opened: {_short(error)}; {_help(url)}") from error
    import fsspec  # type: ignore[import-untyped]

    try:
        opened, base = fsspec.core.url_to_fs(url.partition("?")[0])
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error
    except ValueError as error:
        raise UserError(
            f"{url}: no storage is known as {scheme}://; there are s3, gs, abfs, hdfs, file, and what fsspec opens"
        ) from error
    return PyFileSystem(FSSpecHandler(opened)), base.rstrip("/")


def _help(url: str) -> str:
    """Where the credentials of a store come from."""
    return CREDENTIALS.get(urlsplit(url).scheme, "see what fsspec says of its credentials")


def _final(error: BaseException) -> str:
    """What is wrong for good; empty where the store may answer later."""
    if isinstance(error, PermissionError):
        return FINAL["ACCESS_DENIED"]
    return next((reason for sign, reason in FINAL.items() if sign in str(error)), "")


def _short(error: BaseException) -> str:
    """The first line of an error, without the store's numbers of requests."""
    return re.sub(r" \(Request ID: .*\)", "", str(error).partition("\n")[0])
