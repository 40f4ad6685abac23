"""The front's figures on the validation split, which a search measures once, at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prunesweep.models import load
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.task import run_task
from prunesweep.search.execution.validation import validate_front
from prunesweep.search.report.display import front_notes
from prunesweep.search.report.page import write_report
from prunesweep.search.store.run import Run
from prunesweep.training import EVAL_BATCH, evaluate, open_data
from tests.search.execution.test_task import begin, nothing


def searched(config: SearchConfig, cache: Path, path: Path) -> Run:
    """A run with two results."""
    run, coordinator = begin(config, cache, path)
    for _ in range(2):
        unit = coordinator.next()
        assert unit is not None
        assert run_task(run.path, unit)["state"] == "finished"
        coordinator.complete(unit.id)
    return run


def test_the_front_is_measured_once_on_images_that_chose_nothing(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path
) -> None:
    config = tiny(search={"trials": 2})
    run = searched(config, runs / "cache", tmp_path / "run")
    before = run.front()
    assert {(p["split"], p["images"], p["ranked_by"]) for p in before} == {("search", 269, "loss")}
    assert front_notes(before)[0].startswith("figures of 269 images held out of the training split")
    seen: list[float] = []
    validate_front(run.path, config, lambda _, share, __: seen.append(share))
    assert seen[-1] == 1
    after, source = run.front(), load(run / "source")
    assert [p["trial"] for p in after] == [p["trial"] for p in before]  # they choose nothing
    for old, new in zip(before, after, strict=True):
        model = load(run / new["model"])
        found = evaluate(model, open_data("digits").val_loader(EVAL_BATCH), source=source)
        assert {name: new[name] for name in ("top1", "loss", "images")}.items() <= found.items()
        assert new["kl"] == pytest.approx(found["kl"])
        assert (new["split"], new["images"]) == ("val", 450)
        assert new["top1_low"] < new["top1"] < new["top1_high"]
        assert {name: new[f"searched_{name}"] for name in ("top1", "loss", "kl", "images")}.items() <= old.items()
    assert "450 validation images, by which nothing was chosen" in front_notes(after)[0]
    assert "compared by loss on 269 images held out of the training split" in front_notes(after)[0]
    seen.clear()
    validate_front(run.path, config, lambda _, share, __: seen.append(share))
    assert seen == []
    page = write_report(run).read_text()
    assert json.dumps(front_notes(after)) in page
    assert page.count('"validation": {"top1"') == len(after)


def test_figures_are_of_the_very_result(tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path) -> None:
    """A trial that is done again, or a damaged file, is measured again."""
    config = tiny(search={"trials": 2})
    run = searched(config, runs / "cache", tmp_path / "run")
    validate_front(run.path, config, nothing)
    result = run.members()[0]
    assert run.validation(result) is not None
    assert run.validation(replace(result, seconds=7.0)) is None
    file = run.trial(result.id) / "validation.json"
    file.write_text(file.read_text().replace('"top1"', '"top2"'))
    with pytest.warns(UserWarning, match="validation.json is damaged"):
        assert run.validation(result) is None
    with pytest.warns(UserWarning, match="validation.json is damaged"):
        validate_front(run.path, config, nothing)
    assert run.validation(result) is not None


def test_without_images_of_its_own_a_search_has_one_kind_of_figures(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path
) -> None:
    config = tiny(search={"trials": 2}, data={"search_split": 0})
    run = searched(config, runs / "cache", tmp_path / "run")
    validate_front(run.path, config, nothing)
    assert not list(run.path.glob("trials/*/validation.json"))
    assert {(p["split"], p["images"]) for p in run.front()} == {("val", 450)}
    assert not any(name.startswith("searched_") for p in run.front() for name in p)
    assert "so they flatter" in front_notes(run.front())[0]
