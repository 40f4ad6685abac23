"""Searches for language models: units of work without Ray, perplexity as an objective."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from prunesweep.models import UserError, arch_of, cost, load, load_provenance
from prunesweep.pruners import Scores
from prunesweep.search.config import SearchConfig, parse_config
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.rungs import MultiObjectiveASHA
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.store.front import hypervolume, pareto_front
from prunesweep.search.store.run import Run
from prunesweep.search.store.study import Study
from prunesweep.training import EVAL_BATCH, evaluate, open_data


def config(**source: object) -> SearchConfig:
    tables = {
        "name": "tiny",
        "data": {"name": "pydocs"},
        "source": {
            "model": "adaptive_lm",
            "args": {"width": 16, "depth": 2, "heads": 2, "mlp": 32, "img_size": (1, 16)},
            "train": {"epochs": 1, "lr": 1e-2, "batch_size": 256},
            **source,
        },
        "scores": {"method": "upvit", "images": 32},
        "space": {"budget": [0.6, 0.9], "skip": [0, 1], "groups": {"embed": 2, "mlp": 4, "dim": 2, "tail": 1}},
        "search": {"trials": 2, "objectives": ["ppl", "params"]},
        "finetune": {"epochs": 1, "batch_size": 256, "distill": [{}]},
    }
    return parse_config(tables, "tiny")


def test_a_unit_gives_a_perplexity(runs: Path, tmp_path: Path) -> None:
    settings = config()
    prepared = prepare(settings, runs / "cache", lambda *_: None)
    assert prepared.figures.ppl == load_provenance(prepared.folder)["ppl"]
    assert prepared.arch.text.vocabulary == open_data("pydocs").info.vocabulary
    assert set(Scores.load(prepared.score_files["upvit"]).vectors) >= {"stages.0.embed", "bands.1.tail", "bands.2.tail"}
    run = Run(tmp_path / "run")
    create_run(run, settings, prepared)
    study = Study(
        run / "study.journal",
        prepared.space.distributions,
        0,
        objectives=("ppl", "params"),
        rank_by=settings.search.rank_by,
    )
    coordinator = Coordinator(run, study, prepared.space, settings.search, max_concurrent=1, seed=0)
    unit = coordinator.next()
    assert unit is not None
    found = run_task(run.path, unit)
    assert found["state"] == "finished", found
    result, model = found["result"], load(run.trial(unit.id) / "model")
    assert (
        evaluate(model, open_data("pydocs", model.pretrained_cfg, search_split=0.2).val_loader(EVAL_BATCH))["ppl"]
        == result["ppl"]
    )
    assert cost(arch_of(model)).params == result["params"]
    coordinator.complete(unit.id)
    (point,) = json.loads((run / "front.json").read_text())
    assert point["ppl"] == result["ppl"] == load_provenance(run / point["model"])["ppl"]
    assert 0 < run.status()["hypervolume"] < 1
    assert run.status()["source"]["ppl"] == prepared.figures.ppl


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"args": {"width": 17, "heads": 1}}, "text.positions = 17: must be even"),
        ({"args": {"vocabulary": "other"}}, "but not the same words"),
        ({"model": "vit_tiny_patch16_224", "args": {}}, "cannot be made|is a model of images"),
    ],
)
def test_a_source_that_does_not_fit_is_named(source: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config(**source), tmp_path, lambda *_: None)


@pytest.mark.parametrize("objectives", [["macs", "params"], ["top1", "ppl"], ["ppl"], ["top1", "ppl", "macs"]])
def test_objectives_are_one_quality_and_costs(objectives: list[str]) -> None:
    with pytest.raises(
        UserError, match="must be top1, or agreement .*, and one or more costs, each once; of texts, ppl"
    ):
        parse_config({**config().model_dump(exclude_none=True), "search": {"objectives": objectives}}, "tiny")


@dataclass(frozen=True)
class P:
    ppl: float
    macs: int


def test_front_and_hypervolume_of_perplexities() -> None:
    source, objectives = {"ppl": 20.0, "macs": 100}, ("ppl", "macs")
    good, cheap, beaten, better = P(25.0, 50), P(40.0, 20), P(41.0, 30), P(16.0, 90)
    assert pareto_front([good, beaten, cheap, better], objectives) == [cheap, good, better]
    assert hypervolume([good], source, objectives) == pytest.approx(0.8 * 0.5)
    assert hypervolume([good, cheap], source, objectives) == pytest.approx(0.8 * 0.5 + 0.5 * 0.3)
    assert hypervolume([better], source, objectives) == pytest.approx(1.0 * 0.1)  # at most the source's


def test_bands_are_those_of_the_cost_behind_a_perplexity() -> None:
    """One candidate per band goes on, though another one of the first band has a lower perplexity."""
    ladder = MultiObjectiveASHA(2, 2, ["minimize", "minimize"], bands=[50], banded=1)
    for candidate, values in enumerate([(10.0, 40.0), (11.0, 30.0), (9.0, 90.0), (30.0, 95.0)]):
        ladder.add(0, candidate, values)
    chosen = []
    while (step := ladder.next()) is not None:
        ladder.promoted(*step)
        chosen.append(step[1])
    assert {candidate < 2 for candidate in chosen} == {True, False}
