"""Front members finetuned further, beside what the search had found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.models import UserError, load
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.promote import choose
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.store.run import Run
from prunesweep.search.store.study import Study
from prunesweep.training import EVAL_BATCH, evaluate, open_data

runner = CliRunner()


@pytest.fixture
def run(tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path) -> Run:
    """A search with its four units done, without Ray."""
    config = tiny(finetune={"epochs": 1})
    prepared = prepare(config, runs / "cache", lambda *_: None)
    run = Run(tmp_path / "run")
    create_run(run, config, prepared)
    study = Study(run / "study.journal", prepared.space.distributions, 0, rank_by=config.search.rank_by)
    coordinator = Coordinator(run, study, prepared.space, config.search, max_concurrent=1, seed=0)
    while (unit := coordinator.next()) is not None:
        assert run_task(run.path, unit)["state"] == "finished"
        coordinator.complete(unit.id)
    return run


def test_the_best_within_a_limit_is_promoted(run: Run) -> None:
    front, source = run.front(), run.metadata()["source"]
    limit = (front[0]["macs"] + 1) / source["macs"]
    assert [p["trial"] for p in choose(run, at=[("macs", limit)])] == [front[0]["trial"]]
    assert choose(run, top=1)[0]["loss"] == min(p["loss"] for p in front)  # which candidates are ranked by
    assert choose(run) == front
    for at, message in (
        ([("macs", 1e-6)], "no model costs that little"),
        ([("latency_ms", 3.0)], "this front has macs, params"),
    ):
        with pytest.raises(UserError, match=message):
            choose(run, at=at)

    command = ["promote", str(run.path), "--recipe", "quick", "--set", "epochs=2", "--set", "batch_size=128"]
    result = runner.invoke(app, [*command, "--at", f"macs={limit}"])
    assert result.exit_code == 0, (result.output, result.exception)
    shown = json.loads(runner.invoke(app, ["front", str(run.path), "--json"]).stdout)
    (found,) = (p for p in shown if p["promoted_top1"] is not None)
    assert found["trial"] == front[0]["trial"]
    assert found["top1"] == front[0]["top1"]  # the search's figure stays
    model = load(found["promoted_model"])
    assert evaluate(model, open_data("digits").val_loader(EVAL_BATCH))["top1"] == found["promoted_top1"]
    facts = json.loads(next((run / "promoted").glob("*/promoted.json")).read_text())
    assert facts["latency"]["median_ms"] > 0
    again = runner.invoke(app, [*command, "--set", "lr=1e-3", "--at", f"macs={limit}"])
    assert "was promoted with another recipe" in str(again.exception)
    config = run / facts["model"] / "config.json"
    older = json.loads(config.read_text())
    del (
        older["config_digest"],
        older["provenance"]["recipe"]["lr_by_share"],
    )  # a field that an earlier version did not have
    config.write_text(json.dumps(older))
    again = runner.invoke(app, [*command, "--at", f"macs={limit}"])
    assert again.exit_code == 0, (again.output, again.exception)
