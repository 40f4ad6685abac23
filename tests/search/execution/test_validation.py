"""The front's figures on the validation split, which a search measures once, at its end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from prunesweep.models import UserError, load
from prunesweep.models.io.files import write_text
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.reopen import reopen
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.execution.validation import validate_front
from prunesweep.search.report.display import front_notes, print_front
from prunesweep.search.report.page import write_report
from prunesweep.search.store.run import Run
from prunesweep.training import EVAL_BATCH, evaluate, open_data
from prunesweep.training.data.digits import Digits
from prunesweep.training.data.registry import KINDS, register
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
    assert page.count('"validation":{"top1"') == len(after)


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


@pytest.fixture
def other_digits() -> Iterator[str]:
    """A data set of the same classes that was split otherwise."""

    class OtherDigits(Digits):
        kind = "other-digits"
        SPLIT_SEED = 1

    register(OtherDigits)
    yield OtherDigits.kind
    del KINDS[OtherDigits.kind]


def test_the_front_is_tested_on_data_that_the_search_never_sees(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path, other_digits: str
) -> None:
    config = tiny(search={"trials": 2}, data={"test": other_digits})
    run = searched(config, runs / "cache", tmp_path / "run")
    assert not any("test" in point for point in run.front())
    validate_front(run.path, config, nothing)
    data, source = open_data(other_digits), load(run / "source")
    for point in run.front():
        found = evaluate(load(run / point["model"]), data.val_loader(EVAL_BATCH), source=source)
        assert {"test": other_digits, "test_images": 450, "test_top1": found["top1"]}.items() <= point.items()
        assert point["test_top1_low"] < point["test_top1"] < point["test_top1_high"]
        assert point["test_loss"] != point["loss"]
    assert "tested on 450 images of other-digits" in front_notes(run.front())
    text = io.StringIO()
    print_front(Console(file=text, width=80), run.front(), 10**6)
    assert f"{run.front()[0]['test_top1']:.2f}" in text.getvalue()
    times = {file: file.stat().st_mtime_ns for file in run.path.glob("trials/*/test.json")}
    validate_front(run.path, config, nothing)
    assert times == {file: file.stat().st_mtime_ns for file in times}


def test_test_data_may_be_named_later_and_are_tested_alone_where_there_is_no_search_split(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path, other_digits: str
) -> None:
    config = tiny(search={"trials": 2}, data={"search_split": 0})
    run = searched(config, runs / "cache", tmp_path / "run")
    later = reopen(run, [f"data.test={other_digits}"])
    write_text(run / "search.toml", later.to_toml())
    validate_front(run.path, later, nothing)
    assert {(point["test_images"], point["split"]) for point in Run(run.path).front()} == {(450, "val")}
    assert not list(run.path.glob("trials/*/validation.json"))


def test_test_data_that_cannot_be_are_refused_before_a_search(
    tiny: Callable[..., SearchConfig], runs: Path, image_folder: Path
) -> None:
    for name, reason in (("digits", "holds what data.name does"), (f"imagefolder:{image_folder}", "has 2")):
        with pytest.raises(UserError, match=reason):
            prepare(tiny(data={"test": name}), runs / "cache", nothing)
