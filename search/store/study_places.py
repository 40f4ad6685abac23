"""Where Optuna's studies of a search lie: in a journal of the run's folder, or in a database that was named by its URL.

A database is PostgreSQL, with a schema of Optuna's own, or Redis, which has Optuna's journal. Its studies are called by
the name of the search, and carry whose they are, for other searches may have some there. Passwords are never part of a
URL: those are kept in the run. They come from the environment, or from where the database's own client looks.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from prunesweep.models import UserError
from prunesweep.models.io.files import publish_file

from .run import set_aside
from .study_url import PACKAGES, PASSWORD

__all__ = ["Database", "JournalFile", "Owner", "Place"]

T = TypeVar("T")

PATIENCE, CONNECT = 120.0, 10  # seconds that a database is asked again, and that a connection may take
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between two questions, the last one again and again
OWNER, DRIVER = "prunesweep:owner", "prunesweep:driver"  # attributes of a study


class Owner(NamedTuple):
    """The run that studies are of.

    Args:
        identity: of the run, wherever it is moved; None before it is made.
        place: its URL, or its machine and folder.
    """

    identity: str | None
    place: str


class Place(Protocol):
    """Where studies lie."""

    @property
    def name(self) -> str:
        """What people call it."""

    def repair(self) -> list[str]:
        """Make it readable after a kill; return lines for people."""

    def open(self) -> BaseStorage:
        """Open it."""

    def called(self, kind: str) -> str:
        """The name that a study of a kind has there."""

    def compare(self, attributes: Mapping[str, Any]) -> None:
        """Raise UserError where a study is another run's, by its user attributes."""

    def take(self, storage: BaseStorage, study_id: int) -> None:
        """Take a study over for this process. Raises UserError where it is another run's."""

    def check(self, storage: BaseStorage, study_id: int) -> None:
        """Raise UserError where another process has taken a study over since."""

    def aside(self, reason: str, word: str = "damaged") -> str:
        """Set aside what cannot be used; return a line for people."""

    def anew(self) -> contextlib.AbstractContextManager[BaseStorage]:
        """Make the studies anew in the storage that this gives, which takes the place of the one before."""


class JournalFile:
    """Optuna's journal in a run's folder, which the run's lease keeps to one driver.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def repair(self) -> list[str]:
        """Cut off a torn last line, which would make every later read fail, and break a dead driver's lock.

        A file that is damaged before that is set aside.
        """
        journal = self.path
        if not journal.exists():
            return []
        if not journal.is_file():  # reading a pipe would wait for ever
            return [self.aside("it is no file")]
        Path(f"{journal}.lock").unlink(missing_ok=True)
        data, notes = journal.read_bytes(), []
        end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
            try:
                json.loads(line)["op_code"]
            except (TypeError, ValueError, KeyError, RecursionError):
                return [self.aside(f"line {number} is no record")]
        if end < len(data):
            notes.append(f"{journal.name}: the last line was torn by a kill; it is cut off")
            os.truncate(journal, end)
        return notes

    def open(self) -> BaseStorage:
        """Open or create it."""
        return JournalStorage(JournalFileBackend(str(self.path)))

    def called(self, kind: str) -> str:
        """Studies are called by their kind."""
        return kind

    def compare(self, attributes: Mapping[str, Any]) -> None:
        """Do nothing."""

    def take(self, storage: BaseStorage, study_id: int) -> None:
        """Do nothing."""

    def check(self, storage: BaseStorage, study_id: int) -> None:
        """Do nothing."""

    def aside(self, reason: str, word: str = "damaged") -> str:
        """Rename the file."""
        kept = set_aside(self.path, word)
        return f"{self.name} is {word} ({reason}): kept as {kept.name}"

    @contextlib.contextmanager
    def anew(self) -> Iterator[BaseStorage]:
        """Write another file, which takes this one's place in one step."""
        with publish_file(self.path) as scratch:
            scratch.unlink(missing_ok=True)  # of a driver that died here
            yield JournalFile(scratch).open()


class Database:
    """Studies of one search in a database.

    Args:
        url: without a password.
        search: the search's name.
        owner: the run that they are of.

    Raises:
        UserError: the package that the database takes is not installed.
    """

    def __init__(self, url: str, search: str, owner: Owner) -> None:
        self.url, self._search, self._owner = url, search, owner
        self._driver = uuid.uuid4().hex
        self._scheme = urlsplit(url).scheme
        self._opened: BaseStorage | None = None
        self._close: Callable[[], object] = lambda: None
        package = PACKAGES[self._scheme]
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"search.study = {url!r}: the package {package} is not installed where the search is driven: "
                f"pip install 'prunesweep[study]' ({error})"
            ) from error

    @property
    def name(self) -> str:
        """What people call it."""
        return f"study {self._search!r} in {self.url}"

    def repair(self) -> list[str]:
        """Do nothing: databases do that by themselves."""
        return []

    def open(self) -> BaseStorage:
        """Connect, once. Raises UserError where the database does not answer, or does not let us in."""
        if self._opened is not None:
            return self._opened
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is experimental in Optuna
                self._opened = _patient(self._connect(), self.url)
                return self._opened
        except UserError:
            raise
        except Exception as error:  # of Optuna, SQLAlchemy, psycopg or redis
            raise UserError(
                f"search.study = {self.url!r}: {_reason(error)}. A password is taken from {PASSWORD}"
                f"{', PGPASSWORD or ~/.pgpass' if self._scheme == 'postgresql' else ''}. The study only remembers "
                "proposals: search.study = journal keeps it in the run's folder, and makes it again from the results"
            ) from None  # whose text may have the password

    def _connect(self) -> BaseStorage:
        password = os.environ.get(PASSWORD)
        if self._scheme == "postgresql":
            from sqlalchemy import make_url

            place = make_url(self.url).set(drivername="postgresql+psycopg")
            place = place if password is None else place.set(password=password)
            options = {"pool_pre_ping": True, "pool_size": 1, "connect_args": {"connect_timeout": CONNECT}}
            storage = RDBStorage(place.render_as_string(hide_password=False), engine_kwargs=options)
            self._close = storage.engine.dispose
            return get_storage(storage)
        from optuna.storages.journal import JournalRedisBackend

        parts = urlsplit(self.url)
        if password is not None:
            user, _, host = parts.netloc.rpartition("@")
            parts = parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}")
        if "socket_connect_timeout" not in parts.query:
            parts = parts._replace(query=f"{parts.query}&socket_connect_timeout={CONNECT}".lstrip("&"))
        backend = JournalRedisBackend(urlunsplit(parts), prefix=f"prunesweep:{self._search}")
        return JournalStorage(backend)

    def called(self, kind: str) -> str:
        """Studies are called by the search and their kind."""
        return f"{self._search}: {kind}"

    def take(self, storage: BaseStorage, study_id: int) -> None:
        """Note whose the study is, and who drives it. Raises UserError where it is another run's."""
        self.compare(storage.get_study_user_attrs(study_id))
        storage.set_study_user_attr(study_id, OWNER, self._owner._asdict())
        storage.set_study_user_attr(study_id, DRIVER, self._driver)

    def compare(self, attributes: Mapping[str, Any]) -> None:
        """Raise UserError where what a study says of its owner is not this run."""
        facts = attributes.get(OWNER)
        if facts is None:
            return
        own = isinstance(facts, dict) and (
            facts.get("place") == self._owner.place
            or (self._owner.identity is not None and facts.get("identity") == self._owner.identity)
        )
        if not own:
            where = facts.get("place") if isinstance(facts, dict) else "an unknown place"
            raise UserError(
                f"search.study = {self.url!r} has a study {self._search!r} of another run, {where}: give this search "
                "another name, delete that study if its run is gone (optuna delete-study --study-name "
                f"'{self.called('proposals')}', and '{self.called('results')}'), or set search.study = journal"
            )

    def look(self) -> None:
        """Raise UserError where the database cannot be used, or has a study of this name that is another run's."""
        try:
            for study in self.open().get_all_studies():
                if study.study_name in (self.called("proposals"), self.called("results")):
                    self.compare(study.user_attrs)
        finally:
            self._close()

    def check(self, storage: BaseStorage, study_id: int) -> None:
        """Raise UserError where another process has taken a study over since."""
        if storage.get_study_user_attrs(study_id).get(DRIVER) != self._driver:
            raise UserError(
                f"search.study = {self.url!r}: another process has taken over the study {self._search!r}; it works on "
                "a copy of this run, or on one of the same name. Give one of them search.study = journal"
            )

    def aside(self, reason: str, word: str = "damaged") -> str:
        """Only say so: what is made again replaces it."""
        return f"{self.name} is {word} ({reason})"

    @contextlib.contextmanager
    def anew(self) -> Iterator[BaseStorage]:
        """Delete the studies; where a driver dies before they are made, they do not agree with the run's files."""
        storage = self.open()
        for study in storage.get_all_studies():
            if study.study_name in (self.called("proposals"), self.called("results")):
                self.compare(study.user_attrs)
                storage.delete_study(study._study_id)
        yield storage


def _patient(storage: BaseStorage, url: str) -> BaseStorage:
    """A storage whose every method is tried again while its database does not answer."""

    def method(name: str) -> Callable[..., Any]:
        found = getattr(storage, name)

        def call(_: BaseStorage, *arguments: Any, **options: Any) -> Any:
            return _asked(lambda: found(*arguments, **options), url)

        return call

    names = [name for name in dir(BaseStorage) if not name.startswith("_")]
    kind: type[BaseStorage] = type("PatientStorage", (BaseStorage,), {name: method(name) for name in names})
    return kind()


def _asked(ask: Callable[[], T], url: str) -> T:
    begun, told = time.monotonic(), False
    for turn in range(10**9):
        try:
            found = ask()
        except Exception as error:
            if not _away(error):
                raise
            waited = time.monotonic() - begun
            if waited > PATIENCE:
                raise UserError(
                    f"search.study = {url!r} has not answered for {waited:.0f} s: {_reason(error)}. Nothing that is "
                    "finished is lost; a resume goes on, with the database or with search.study = journal"
                ) from None
            if not told:
                told = True
                warnings.warn(f"{url} does not answer ({_reason(error)}); asked again until it does", stacklevel=2)
            time.sleep(PAUSES[min(turn, len(PAUSES) - 1)])
        else:
            return found
    raise AssertionError


def _away(error: BaseException) -> bool:
    """Whether an error means that a database cannot be reached now."""
    cause = _cause(error)
    where, name = type(cause).__module__.partition(".")[0], type(cause).__name__
    if where == "sqlalchemy":
        return name in ("OperationalError", "InterfaceError") or bool(getattr(cause, "connection_invalidated", False))
    return where == "redis" and name in ("ConnectionError", "TimeoutError")


def _cause(error: BaseException) -> BaseException:
    """What an error of Optuna's is about."""
    return error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error


def _reason(error: BaseException) -> str:
    """What a database says, in one line, without SQLAlchemy's name of it, and never with the password."""
    cause = _cause(error)
    text = next((line.strip() for line in str(getattr(cause, "orig", None) or cause).splitlines() if line.strip()), "")
    password = os.environ.get(PASSWORD)
    return (text if not password else text.replace(password, "***")) or type(cause).__name__
