"""Studies in a database: they propose what a journal does, are one run's, and losing them loses nothing."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from prunesweep.models import UserError
from prunesweep.search.config import SearchTable, parse_config
from prunesweep.search.store import study_places
from prunesweep.search.store.run import Task
from prunesweep.search.store.study import Study
from prunesweep.search.store.study_places import Database, Owner
from prunesweep.search.store.study_url import PASSWORD, why_not
from tests import databases
from tests.conftest import TINY
from tests.databases import Postgres
from tests.search.store.test_study import SPACE, result, run

HERE = Owner("a" * 32, "host:/runs/one")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with databases.postgres() as found:
        yield found


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with databases.redis() as found:
        yield found


@pytest.fixture(params=["postgres", "redis"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of either kind."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis"))
    monkeypatch.setenv(PASSWORD, databases.PASSWORD)
    return str(request.getfixturevalue("server").url())


def test_it_proposes_what_a_journal_does_and_goes_on(url: str, tmp_path: Path) -> None:
    def study(where: Path | Database) -> Study:
        return Study(where, SPACE, seed=3, name="equal")

    own, there = tmp_path / "journal", Database(url, "equal", HERE)
    assert run(study(there), 6) == run(study(own), 6)
    number, point = study(there).ask()  # by a driver that died
    again = study(Database(url, "equal", Owner(HERE.identity, "host:/moved/there")))
    assert again.running() == {number: point}
    again.tell(number, [50.0, 10])
    results = [result(0, 48.0, 100), result(0, 83.0, 100, rung=1, epochs=4), result(1, 90.0, 400)]
    again.record(results)
    again.settle(results)
    assert again.count(optuna.trial.TrialState.COMPLETE) == 7
    assert again.notes == []


def test_it_is_one_runs_and_one_drivers(url: str) -> None:
    first = Study(Database(url, "mine", HERE), SPACE, seed=0, name="mine")
    run(first, 2)
    Database(url, "mine", Owner(None, HERE.place)).look()  # a new run in the place of one that was deleted
    other = Database(url, "mine", Owner("b" * 32, "host:/runs/two"))
    for use in (other.look, lambda: Study(other, SPACE, seed=0, name="mine")):
        with pytest.raises(
            UserError, match=r"has a study 'mine' of another run, host:/runs/one: give this search anot"
        ):
            use()
    run(Study(Database(url, "mine", HERE), SPACE, seed=0, name="mine"), 1)  # of a copy of the run
    with pytest.raises(UserError, match="another process has taken over the study 'mine'"):
        first.ask()


def test_it_is_made_again_from_the_results(url: str) -> None:
    """Whatever was lost; a study of the same place that is another run's is replaced."""
    results = [result(0, 50.0, 100), result(1, 60.0, 200)]
    tasks = {r.trial: Task(r.trial, r.point, r.arch_hash, "key", 0) for r in results}

    def follow() -> Study:
        study = Study(Database(url, "lost", HERE), SPACE, seed=0, name="lost")
        study.follow(tasks, results, failed=[], next_number=3)
        return study

    study = follow()
    again = f"study 'lost' in {url} was made again from the files of 2 results"
    assert study.notes == [again]
    assert study.count(optuna.trial.TrialState.COMPLETE) == 2
    assert study.ask()[0] == 3
    assert follow().notes == []
    run(Study(Database(url, "lost", HERE), SPACE, seed=0, name="lost"), 1)
    del tasks[1], results[1]
    notes = follow().notes
    assert "is outdated (it has a result of" in notes[0]
    assert notes[1] == again.replace("2 results", "1 results")


def test_a_database_that_goes_away_is_waited_for(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, databases.PASSWORD)
    url = server.url()
    study = Study(Database(url, "away", HERE), SPACE, seed=0, name="away")
    run(study, 1)
    server.stop()
    late = threading.Timer(1.0, server.start)
    late.start()
    with pytest.warns(UserWarning, match="does not answer .*; asked again until it does"):
        run(study, 2)
    late.join()
    assert study.count(optuna.trial.TrialState.COMPLETE) == 3

    server.stop()
    monkeypatch.setattr(study_places, "PATIENCE", 0.3)
    try:
        with (
            warnings.catch_warnings(record=True),
            pytest.raises(UserError, match=r"has not answered for \d s: connection.*a resume"),
        ):
            study.ask()
        with pytest.raises(
            UserError, match=rf"search.study = '{url}': connection failed.*search.study = journal keeps"
        ):
            Database(url, "away", HERE).look()
    finally:
        server.start()


def test_the_password_is_asked_for_and_never_told(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.url()
    monkeypatch.delenv(PASSWORD, raising=False)
    with pytest.raises(UserError, match=f"no password supplied. A password is taken from {PASSWORD}, PGPASSWORD"):
        Database(url, "any", HERE).look()
    monkeypatch.setenv(PASSWORD, "wrong-and-secret")
    with pytest.raises(UserError, match="password authentication failed") as found:
        Database(url, "any", HERE).look()
    assert "wrong-and-secret" not in str(found.value)
    assert found.value.__suppress_context__
    monkeypatch.delenv(PASSWORD)
    monkeypatch.setenv("PGPASSWORD", databases.PASSWORD)
    Database(url, "any", HERE).look()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("postgresql://me:hush-hush@host/db", "has a password, which would be kept in the run and shown: leave it out"),
        ("postgresql://me@host/db?sslpassword=hush-hush", "has a password"),
        ("redis://:hush-hush@host:6379/0", f"has a password.*give it by {PASSWORD} where the search is driven"),
        ("mysql://me:hush-hush@host/db", "has a password"),
        ("mysql://me@host/db", r"takes journal, postgresql://USER@HOST/DATABASE or redis://HOST:6379/0, not mysql://"),
        ("postgresql://me@host:port/db", "is no URL"),
        ("studies.db", "takes journal, postgresql"),
    ],
)
def test_what_cannot_be_a_place_is_said_without_its_password(given: str, message: str) -> None:
    with pytest.raises(UserError, match=f"search: study: {message}") as found:
        parse_config({**TINY, "search": {**TINY["search"], "study": given}}, "tiny")
    assert "hush-hush" not in str(found.value)
    for fine in ("journal", "postgresql://me@host/db", "postgresql:///db?host=/run/postgresql", "redis://host:6379/0"):
        assert why_not(fine) == ""
    assert SearchTable().study == "journal"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, package in (("postgresql://me@host/db", "psycopg"), ("rediss://host:6379/0", "redis")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            UserError, match=rf"the package {package} is not installed .*pip install 'prunesweep\[study\]'"
        ):
            Database(url, "any", HERE)


def test_a_redis_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"search.study = 'redis://127.0.0.1:1/0': .*refused"):
        Database("redis://127.0.0.1:1/0", "any", HERE).look()
    assert time.monotonic() - begun < 5
