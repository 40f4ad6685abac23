"""Searches for agreement with the source: without labels, and with labels that nothing is chosen by."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prunesweep.models import UserError
from prunesweep.search import run_search
from prunesweep.search.config import SearchConfig, parse_config
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.promote import choose
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.store.run import Run
from prunesweep.search.store.study import Study
from tests.launch.test_unlabelled import agreement, pictures, trained

TAUGHT = {"epochs": 1, "batch_size": 32, "lr": 1e-4, "loss_weight": 0, "distill": [{"kind": "soft"}]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pictures(tmp_path_factory.mktemp("tree"))


def config(source: Path, data: str, *, finetune: Any = None, **search: Any) -> SearchConfig:
    tables = {
        "name": "tiny",
        "data": {"name": data, "search_split": 0},
        "source": {"model": f"local-dir:{source}"},
        "scores": {"method": "taylor", "images": 64},
        "space": {"budget": [0.5, 0.9], "skip": [0, 1], "groups": {"embed": 4, "mlp": 8, "qk": 4, "v": 4}},
        "search": {"trials": 2, "objectives": ["agreement", "macs"], "screen_images": 64, **search},
        "finetune": {**TAUGHT, **(finetune or {})},
        "resources": {"cpus": 1},
    }
    return parse_config(tables, "tiny")


@pytest.mark.parametrize("labelled", [False, True])
def test_a_unit_gives_an_agreement(source: Path, tree: str, tmp_path: Path, labelled: bool) -> None:
    data = "digits" if labelled else tree
    settings = config(source, data)
    prepared = prepare(settings, tmp_path / "cache", lambda *_: None)
    assert prepared.figures.agreement == 100
    assert (prepared.figures.top1 is None) is not labelled
    run = Run(tmp_path / "run")
    create_run(run, settings, prepared)
    study = Study(
        run / "study.journal",
        prepared.space.distributions,
        0,
        objectives=("agreement", "macs"),
        rank_by=settings.search.rank_by,
    )
    coordinator = Coordinator(run, study, prepared.space, settings.search, max_concurrent=1, seed=0)
    unit = coordinator.next()
    assert unit is not None
    found = run_task(run.path, unit)
    assert found["state"] == "finished", found
    result = found["result"]
    measured = agreement(source, run.trial(unit.id) / "model", data)
    assert (result["agreement"], result["kl"]) == pytest.approx(measured, rel=1e-4)
    assert (result["top1"] is None) is not labelled
    assert 0 <= result["zero_shot"] <= 100
    coordinator.complete(unit.id)
    (point,) = json.loads((run / "front.json").read_text())
    assert point["agreement"] == result["agreement"]
    assert choose(run, top=1) == [point]
    assert 0 < run.status()["hypervolume"] < 1
    assert run.status()["source"]["agreement"] == 100


def test_what_needs_labels_is_named_before_the_search(source: Path, tree: str, tmp_path: Path) -> None:
    by_labels = config(source, tree, objectives=["top1", "macs"])
    with pytest.raises(UserError, match=r"has no labels for objectives = .* search.objectives = ..agreement"):
        prepare(by_labels, tmp_path, lambda *_: None)
    with pytest.raises(UserError, match="has no labels to train on: set the recipe's loss_weight = 0"):
        prepare(config(source, tree, finetune={"loss_weight": 1}), tmp_path, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("objectives", [["agreement", "top1", "macs"], ["agreement"], ["agreement", "ppl", "macs"]])
def test_one_quality_and_a_cost_are_optimised(source: Path, tree: str, objectives: list[str]) -> None:
    with pytest.raises(UserError, match="must be top1, or agreement with the source, and one or more costs"):
        config(source, tree, objectives=objectives)


@pytest.mark.slow
def test_a_search_without_labels(source: Path, tree: str, tmp_path: Path) -> None:
    text = StringIO()
    settings = config(source, tree, rungs=[0, 1], trials=4, reduction_factor=2)
    result = run_search(settings, tmp_path / "run", console=Console(file=text, width=120))
    assert result is not None
    assert result.finished, text.getvalue()
    run = Run(tmp_path / "run")
    results = run.results()
    assert [r.trial for r in results if r.rung == 0] == [0, 1, 2, 3]
    assert all(r.top1 is None and r.agreement is not None for r in results)
    assert run.front()
    for point in run.front():
        measured = agreement(source, run / point["model"], tree)
        assert (point["agreement"], point["kl"]) == pytest.approx(measured, rel=1e-4)
    assert "agreement (%)" in text.getvalue()
    assert '"agreement"' in (run / "report.html").read_text()
