"""What MLflow and Weights & Biases are told of a search, and that a search does not depend on them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prunesweep.models import UserError
from prunesweep.search import run_search
from prunesweep.search.config import LoggingTable, SearchConfig
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.store.run import Run
from prunesweep.search.tracking import Tracker, check_backends
from prunesweep.search.tracking.backends import backends
from tests.search.execution.test_coordinator import start, work
from tests.search.helpers import make_run


def searched(run: Run, table: LoggingTable, trials: int, note: Callable[[str], None] = print) -> Coordinator:
    """A search whose results are made up, and a driver that tells of it."""
    coordinator = start(run, requested=trials)
    tracker = Tracker(
        backends(table, run, "one", {"search": {"trials": trials}}), coordinator, run.searched_source(), note
    )
    tracker.changed()
    while (unit := coordinator.next()) is not None:
        work(run, unit)
        coordinator.complete(unit.id)
        tracker.changed()
    tracker.close(run.front(), finished=coordinator.finished)
    return coordinator


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes ten seconds to make
    return f"file:{tmp_path / 'mlruns'}"


def test_mlflow_has_a_run_of_the_search_and_one_of_every_result_within(tmp_path: Path, mlflow_store: str) -> None:
    from mlflow.tracking import MlflowClient

    run, table = make_run(tmp_path / "run"), LoggingTable(mlflow=mlflow_store)
    searched(run, table, 2)
    coordinator = searched(run, table, 4)  # resumed for more trials: the same run goes on, and nothing is told twice
    client = MlflowClient(mlflow_store)
    experiment = client.get_experiment_by_name("prunesweep")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    (parent,) = (one for one in found if "mlflow.parentRunId" not in one.data.tags)
    assert (parent.info.run_name, parent.info.status) == ("one", "FINISHED")
    assert parent.data.params == {"search.trials": "2"}
    assert parent.data.metrics["tasks_done"] == 4
    assert parent.data.metrics["front_size"] == len(coordinator.best)
    below = {one.info.run_name: one for one in found if one is not parent}
    assert len(found) == 5
    assert {one.data.tags["mlflow.parentRunId"] for one in below.values()} == {parent.info.run_id}
    for result in coordinator.results:
        one = below[result.id]
        assert one.data.metrics["top1"] == result.top1
        assert one.data.metrics["macs"] == result.macs
        assert one.data.params["budget"] == str(result.point["budget"])
    (file,) = (tmp_path / "mlruns").rglob("front.json")
    front = json.loads(file.read_text())
    trials = [row[front["columns"].index("trial")] for row in front["data"]]
    assert trials == [point["trial"] for point in run.front()]


def test_wandb_has_a_run_of_the_search_and_one_of_every_result_in_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    table = LoggingTable(wandb="project")
    check_backends(table)
    run, told = make_run(tmp_path / "run"), list[str]()
    coordinator = searched(run, table, 2, told.append)
    names = [path.name.split("-", 3)[-1] for path in (run / "wandb").glob("offline-run-*")]
    identity = min(names, key=len)
    assert sorted(names) == sorted([identity, *(f"{identity}-{result.id}" for result in coordinator.results)])
    assert told == []


def test_a_tool_that_does_not_answer_is_told_no_more_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told = list[str]()
    coordinator = searched(make_run(tmp_path / "run"), LoggingTable(mlflow="http://127.0.0.1:9"), 3, told.append)
    assert coordinator.finished
    (line,) = told
    assert line.startswith("warning: logging.mlflow is told no more, the search goes on: ")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_found_before_any_work(
    name: str, tiny: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *more: None if asked == name else there(asked, *more)
    )
    with pytest.raises(UserError, match=rf"logging.{name} = 'x'.*pip install 'prunesweep\[{name}\]'"):
        run_search(tiny(logging={name: "x"}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_key_is_found_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", os.devnull)
    with pytest.raises(UserError, match="no key of Weights & Biases"):
        check_backends(LoggingTable(wandb="project"))
