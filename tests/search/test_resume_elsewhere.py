"""Searches that are resumed after trials have really failed, and from another folder than they were begun in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import save
from prunesweep.search.store.run import Run
from tests.search.execution.test_task import folder_config, small_timm
from tests.search.test_end_to_end import Search, config, finished  # noqa: F401 (fixtures)
from tests.training.data.test_data import shards  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow


def test_trials_that_have_failed_are_done_again(finished: Any, runs: Path) -> None:  # noqa: F811
    """One whose training raises an error, on a worker, is booked as failed, and done again when that is asked for."""
    run = Run(runs / "really-failed")
    shutil.copytree(finished[0].path, run.path)
    before = {r.trial: (r.point, r.top1, r.loss) for r in run.results()}
    folder = run.trial("r0-0001")
    for name in ("result.json", "metrics.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "model")
    (folder / "metrics.jsonl").mkdir()  # no log of the training can be written

    code, output = Search("resume", str(run.path)).end()
    assert code == 0, output  # the others are a front
    assert list(run.failures()) == ["r0-0001"]
    assert "IsADirectoryError" in run.failures()["r0-0001"]
    assert run.status()["trials"] == {"finished": 3, "running": 0, "pending": 0, "failed": 1}
    assert {p["trial"] for p in run.front()} <= {0, 2, 3}

    again = "1 trial failed before"
    code, output = Search("resume", str(run.path)).end()
    assert code == 0, output
    assert f"{again} (--retry-failed does them again):\n  1 x IsADirectoryError" in output
    assert list(run.failures()) == ["r0-0001"]

    code, output = Search("resume", str(run.path), "--retry-failed").end()  # it fails again, and that is told
    assert code == 0, output
    assert f"{again}: done again now" in output
    assert list(run.failures()) == ["r0-0001"]

    (folder / "metrics.jsonl").rmdir()
    code, output = Search("resume", str(run.path), "--retry-failed").end()
    assert code == 0, output
    assert run.failures() == {}
    assert {r.trial: (r.point, r.top1, r.loss) for r in run.results()} == before
    assert sorted(path.name for path in folder.glob("result.json*")) == [
        "result.json",
        "result.json.failed-1",
        "result.json.failed-2",
    ]


def test_relative_shards_are_found_from_another_folder(
    shards: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(shards, home / "shards")
    save(small_timm(), home / "source")
    made = folder_config(
        home / "shards",
        {"model": f"local-dir:{home / 'source'}"},
        data={"name": f"wds:{home / 'shards'}", "search_split": 0.0},
        search={"trials": 1, "recover_images": 8},
        resources={"cpus": 1},
    )
    relative = made.to_toml().replace(f"{home}/", "")
    assert 'name = "wds:shards"' in relative
    assert 'model = "local-dir:source"' in relative
    (home / "c.toml").write_text(relative)
    code, output = Search("search", "c.toml", "--out", "run", cwd=home).end()
    assert code == 0, output
    run = Run(home / "run")
    assert len(run.results()) == 1

    code, output = Search("resume", str(run.path), "--trials", "2", cwd=elsewhere).end()
    assert code == 0, output
    assert len(run.results()) == 2
    assert run.failures() == {}
    code, output = Search("eval", str(run.path), "--json", cwd=elsewhere).end()
    assert code == 0, output
    assert len(json.loads(output.splitlines()[-1])) == len(run.front())

    shutil.move(home / "shards", elsewhere / "moved")  # and given again by a path that is relative to here
    code, output = Search("resume", str(run.path), "--trials", "3", cwd=elsewhere).end()
    assert code != 0
    assert "If they were moved, give their new place" in output
    assert run.failures() == {}
    moved = ("--set", "data.name=wds:moved")
    code, output = Search("resume", str(run.path), "--trials", "3", *moved, cwd=elsewhere).end()
    assert code == 0, output
    assert len(run.results()) == 3
