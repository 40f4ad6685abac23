"""Searches by a measure of one's own: a function, or what the features of a backbone without a head are worth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset

from prunesweep.launch.cli import main
from prunesweep.models import UserError, save
from prunesweep.search import resume_search, run_search
from prunesweep.search.config import parse_config
from prunesweep.search.execution.reopen import reopen
from prunesweep.search.store.front import Ranking, hypervolume
from prunesweep.search.store.run import Run
from prunesweep.training import Data, Quality, evaluate, own_quality, try_quality
from prunesweep.training.quality import FEW
from tests.generate import random_model
from tests.models.test_in_other_code import KINDS
from tests.search.in_process import without_ray
from tests.search.test_from_python import tables
from tests.training.data.test_own import pair


@own_quality(higher_is_better=False)
def misses(model: nn.Module, loader: Iterable[Any]) -> float:
    """How many images of class 0 are answered otherwise."""
    assert not model.training
    assert not torch.is_grad_enabled()
    return float(sum(int((model(x[y == 0]).argmax(1) != 0).sum()) for x, y in loader))


@own_quality(higher_is_better=True)
def broken(model: nn.Module, loader: Iterable[Any]) -> float:
    raise ZeroDivisionError("no image")


@own_quality(higher_is_better=True)
def mistaken(model: nn.Module, loader: Iterable[Any]) -> float:
    return model.logits(next(iter(loader))[0]).mean()  # type: ignore[operator]


@own_quality(higher_is_better=True)
def demanding(model: nn.Module, loader: Iterable[Any]) -> float:
    """Needs more images than it is tried on."""
    images = sum(len(y) for _, y in loader)
    if images <= FEW:
        raise ValueError("too few images")
    return float(images)


def unmarked(model: nn.Module, loader: Iterable[Any]) -> float:
    return 0.0


HERE = f"python:{__name__}"


def source_of(folder: Path, **changes: Any) -> Path:
    model = random_model(KINDS["attention"], 0, torch.float32)
    if changes:
        model.reset_classifier(0)  # type: ignore[operator]
    return save(model, folder / "source", **({} if changes else {"classes": ["a", "b", "c"]}))


def test_the_names_are_checked_first(tmp_path: Path) -> None:
    for search, message in (
        ({"quality": "f1"}, "must be knn, probe or python:MODULE:FUNCTION"),
        ({"objectives": ["quality", "macs"]}, "search.quality must say what measures it"),
        ({"quality": "knn", "objectives": ["top1", "macs"]}, "in the place of another one"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config(tables(tmp_path, **search), "own")
    assert parse_config(tables(tmp_path, quality="knn"), "own").search.objectives == ("quality", "macs")
    for spec, message in (
        (f"{HERE}:unmarked", "no function with the decorator prunesweep.training.own_quality"),
        (f"{HERE}:absent", "no function with the decorator prunesweep.training.own_quality"),
        ("python:os:getcwd", "names code, which a configuration alone does not run"),
    ):
        with pytest.raises(UserError, match=message):
            run_search(tables(tmp_path, quality=spec), tmp_path / "run")
    with pytest.raises(UserError, match="unmarked does not say whether higher is better"):
        run_search(tables(tmp_path), tmp_path / "run", quality=unmarked)
    with pytest.raises(UserError, match="is not seen by other processes"):
        run_search(tables(tmp_path), tmp_path / "run", quality=own_quality(higher_is_better=True)(lambda *_: 0.0))
    with pytest.raises(UserError, match="'knn': is for a source without a head; this one has 3 classes"):
        run_search(tables(source_of(tmp_path), quality="knn"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_function_is_tried_before_anything_is_made(tmp_path: Path) -> None:
    said = r"search.quality = .*:mistaken': mistaken: AttributeError: .* 'logits' \(line \d+ of .*test_own_quality.py"
    with pytest.raises(UserError, match=said):
        run_search(tables(source_of(tmp_path)), tmp_path / "runs" / "one", quality=mistaken)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_what_a_few_images_or_an_untrained_model_cannot_tell_is_no_mistake() -> None:
    model, data = random_model(KINDS["attention"], 0, torch.float32), Data.of(*pair(60), classes=["a", "b", "c"])
    try_quality(f"{HERE}:broken", model, data)  # a division by zero may be due to the answers
    try_quality("knn", model, data)
    with pytest.raises(UserError, match="demanding: ValueError: too few images"):
        try_quality(f"{HERE}:demanding", model, data)
    train, val = pair(60)
    try_quality(f"{HERE}:demanding", model, Data.of(train, ConcatDataset([val] * FEW), classes=["a", "b", "c"]))


def test_a_module_that_fails_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_written.py").write_text("def worst(model, loader:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PRUNESWEEP_MODULES", "half_written")
    with pytest.raises(UserError, match=r"half_written cannot be imported: SyntaxError: .*half_written.py, line 1"):
        Quality.find("python:half_written:worst")


def test_evaluate_names_what_a_function_gives(tmp_path: Path) -> None:
    model = random_model(KINDS["attention"], 0, torch.float32).train()
    x, y = torch.randn(6, 3, 6, 8), torch.tensor([0, 1, 0, 2, 0, 1])
    found = evaluate(model, [(x, y)], quality=misses)
    with torch.no_grad():
        assert found["misses"] == (model.eval()(x[y == 0]).argmax(1) != 0).sum()
    assert {"top1", "loss"} <= found.keys()
    with pytest.raises(UserError, match=r"broken: ZeroDivisionError: no image \(line \d+ of .*test_own_quality.py"):
        evaluate(model, [(x, y)], quality=broken)
    with pytest.raises(UserError, match="only once"):
        evaluate(model, iter([(x, y)]), quality=misses)


def test_less_of_an_error_is_better() -> None:
    def point(**own: float) -> Any:
        return SimpleNamespace(trial=0, rung=0, epochs=1, kl=0.0, loss=0.0, **own)

    few, many, cheap = point(error=2.0, macs=8), point(error=4.0, macs=8), point(error=4.0, macs=4)
    objectives = ("error", "macs")
    assert Ranking(objectives, "auto").front([many, few, cheap]) == [cheap, few]
    assert hypervolume([few], {"error": 1.0, "macs": 10}, objectives) == pytest.approx(0.5 * 0.2)
    assert hypervolume([point(quality=3.0, macs=5)], {"quality": 4.0, "macs": 10}, ("quality", "macs")) == 0.375
    below = hypervolume([point(quality=-3.0, macs=5)], {"quality": -2.0, "macs": 10}, ("quality", "macs"))
    assert 0 < below < hypervolume([point(quality=-2.0, macs=5)], {"quality": -2.0, "macs": 10}, ("quality", "macs"))


@pytest.mark.slow
def test_a_function_is_the_objective_of_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    run = tmp_path / "run"
    result = run_search(tables(source_of(tmp_path), trials=2), run, quality=misses, progress=True)
    assert result is not None
    said = capsys.readouterr().out
    assert "trial 0: misses " in said
    assert "compared by misses" in said
    for one in Run(run).results():
        assert one.error is not None
        assert one.quality is None
    assert {point["measure"] for point in result.front} == {"misses"}
    assert Run(run).objectives == ("error", "macs")
    assert math.isfinite(Run(run).status()["source"]["error"])
    for command in (["front", str(run)], ["status", str(run)], ["eval", str(run)], ["report", str(run)]):
        with pytest.raises(SystemExit, match="0"):
            main(command)
        assert command[0] == "report" or "misses" in capsys.readouterr().out
    before = Run(run).metadata()
    (run / "run.json").unlink()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PRUNESWEEP_MODULES", "")
        with pytest.raises(UserError, match="the source, which has to be measured: .* names code"):
            reopen(Run(run))
    reopen(Run(run))
    after = Run(run).metadata()
    assert {**after, "content": before["content"], "versions": before["versions"]} == before
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PRUNESWEEP_MODULES", "")
        with pytest.raises(UserError, match="names code, which a configuration alone does not run"):
            resume_search(run, trials=3)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert '"measure": "misses"' in page or '"measure":"misses"' in page


@pytest.mark.slow
def test_features_are_searched_by_their_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    config = tables(source_of(tmp_path, headless=True), quality="knn", trials=2)
    with pytest.raises(UserError, match="has no head, so it gives features and no answers"):
        run_search(config, tmp_path / "run")
    config["finetune"]["recipe"] = "gentle"
    result = run_search(config, tmp_path / "run", progress=True)
    assert result is not None
    assert "k-NN top-1 (%)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["front", str(tmp_path / "run"), "--json"])
    points = json.loads(capsys.readouterr().out)
    assert points
    assert all(0 <= point["quality"] <= 100 and point["measure"] == "k-NN top-1 (%)" for point in points)
