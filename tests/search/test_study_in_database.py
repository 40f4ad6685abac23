"""A search whose study is in PostgreSQL: killed, gone on with, and going on without it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError
from prunesweep.search import resume_search, run_search
from prunesweep.search.config import SearchConfig
from prunesweep.search.store.run import Run
from prunesweep.search.store.study_url import PASSWORD
from prunesweep.search.verify import verify
from tests import databases
from tests.launch.test_cli import call
from tests.search.in_process import without_ray
from tests.search.test_stored_search import DRIVER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def worth(run: Run) -> list[tuple[Any, ...]]:
    return [(r.id, r.key, r.loss, r.macs) for r in run.results()]


def test_kill_9_of_the_driver_and_the_loss_of_the_database(
    tiny: Callable[..., SearchConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The results are those of a search with its journal; what shows a run needs no database."""
    run, file = Run(tmp_path / "one" / "tiny"), tmp_path / "tiny.toml"
    with databases.postgres() as server:
        config = tiny(search={"trials": 3, "study": server.url()})
        file.write_text(config.to_toml())
        told = (tmp_path / "told").open("wb")
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(file), str(run.path)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, PASSWORD: databases.PASSWORD},
            stdout=told,
            stderr=told,
        )
        try:
            deadline = time.monotonic() + 200
            while not (run.path / "trials/r0-0000/result.json").exists():
                assert time.monotonic() < deadline
                assert driver.poll() is None, (tmp_path / "told").read_text()
                time.sleep(0.02)
        finally:
            driver.kill()
            driver.wait()
        before = (run.path / "trials/r0-0000/result.json").read_bytes()

        without_ray(monkeypatch)
        with pytest.raises(UserError, match=f"no password supplied. A password is taken from {PASSWORD}"):
            resume_search(run.path)
        monkeypatch.setenv(PASSWORD, databases.PASSWORD)
        with pytest.raises(UserError, match=rf"has a study 'tiny' of another run, \S+:{run.path}: give this search"):
            run_search(config, tmp_path / "two" / "tiny")
        assert not (tmp_path / "two" / "tiny").exists()
        assert resume_search(run.path).finished
        assert not (run.path / "study.journal").exists()
        assert verify(run.path) == []

    with pytest.raises(UserError, match=r"search.study = 'postgresql://searcher@127.0.0.1:\d+/postgres': connection"):
        resume_search(run.path, trials=4)
    code, out, _ = call(capsys, "status", str(run.path))
    assert (code, "3" in out) == (0, True)
    assert call(capsys, "front", str(run.path))[0] == 0
    own = run_search(tiny(search={"trials": 3}), tmp_path / "journal" / "tiny")
    assert own is not None
    assert worth(run) == worth(Run(own.path))
    assert resume_search(run.path, trials=4, overrides=["search.study=journal"]).finished
    assert worth(run)[:3] == worth(Run(own.path))
    assert len(worth(run)) == 4
    assert (run.path / "trials/r0-0000/result.json").read_bytes() == before
    assert verify(run.path) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if databases.PASSWORD.encode() in path.read_bytes()]
