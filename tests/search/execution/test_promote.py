"""Front members finetuned further, beside what the search had found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.models import UserError, load
from prunesweep.models.io.objects import Objects
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.promote import choose
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.store import promoting
from prunesweep.search.store.promoting import Promotions
from prunesweep.search.store.run import Run
from prunesweep.search.store.study import Study
from prunesweep.training import EVAL_BATCH, evaluate, open_data
from tests.object_store import Store, serving
from tests.search.execution.test_elsewhere import eventually

runner = CliRunner()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as found:
        yield found


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


def published(run: Run, url: str) -> Objects:
    """Put a run's folder into a store."""
    objects = Objects(url)
    for path in run.path.rglob("*"):
        if path.is_file() and not path.is_symlink() and "front" not in path.parts:
            objects.put(path.relative_to(run.path).as_posix(), path)
    return objects


@pytest.mark.slow
def test_a_model_of_a_run_in_a_store_is_promoted_as_one_of_a_folder(
    run: Run, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "laptop"))
    url = store.url("promote/run")
    objects, options = published(run, url), ["--recipe", "quick", "--top", "1", "--set", "epochs=1"]
    own = runner.invoke(app, ["promote", str(run.path), *options, "--set", "batch_size=128"])
    assert own.exit_code == 0, (own.output, own.exception)
    found = runner.invoke(app, ["promote", url, *options, "--set", "batch_size=128"])
    assert found.exit_code == 0, (found.output, found.exception)
    (unit,) = (path.name for path in (run / "promoted").glob("r*"))
    assert f"{unit}: {url}/promoted/{unit}/model" in found.output
    assert f"prunesweep fetch {url}" in found.output
    mine, theirs = (
        json.loads(text)
        for text in (
            (run / f"promoted/{unit}/promoted.json").read_text(),
            objects.read(f"promoted/{unit}/promoted.json"),
        )
    )
    for facts in (mine, theirs):
        del facts["latency"], facts["digest"]
    assert theirs == mine
    there = objects.list("promoted/")
    assert f"promoted/{unit}/model/model.safetensors" in there
    assert not [name for name in there if "/.model" in name]
    assert b"promoted" in objects.read("report.html")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # where it is promoted already
    before = objects.stamp(f"promoted/{unit}/model/model.safetensors")
    assert runner.invoke(app, ["promote", url, *options, "--set", "batch_size=128"]).exit_code == 0
    assert objects.stamp(f"promoted/{unit}/model/model.safetensors") == before
    shown = json.loads(runner.invoke(app, ["front", url, "--json"]).stdout)
    assert [p["promoted_model"] for p in shown if p["promoted_model"]] == [f"{url}/promoted/{unit}/model"]


def test_another_machine_goes_on_with_a_promotion(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promoting, "STATE", 0.05)
    url = store.url("moves/run")
    objects, unit = Objects(url), "r0-0001"
    objects.write("run.json", b"{}")

    class KilledError(Exception):
        pass

    def machine(name: str) -> tuple[Promotions, Path]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        found = Promotions(url)
        return found, found.path / "promoted" / unit / ".model-0a1b" / "state.safetensors"

    first, state = machine("first")
    with pytest.raises(KilledError), first.making(unit):
        state.parent.mkdir(parents=True)
        state.write_text("epoch 1")
        eventually(lambda: f"promoted/{unit}/.model-0a1b/state.safetensors" in objects.list())
        with pytest.raises(UserError, match=rf"{url}/promoted/{unit} is in use by process .*stop it \(Ctrl-C there\)"):
            machine("second")[0].making(unit).__enter__()
        raise KilledError
    second, there = machine("second")
    with second.making(unit):
        assert there.read_text() == "epoch 1"
        there.unlink()
        there.parent.rmdir()
        (second.path / "promoted" / unit / "model").mkdir()
        (second.path / "promoted" / unit / "model" / "config.json").write_text("{}")
        (second.path / "promoted" / unit / "promoted.json").write_text("{}")
    made = {name for name in objects.list("promoted/") if "/.lease/" not in name}
    assert made == {f"promoted/{unit}/model/config.json", f"promoted/{unit}/promoted.json"}
    first, state = machine("first")
    with first.making(unit):
        assert not state.exists()
        assert (first.path / "promoted" / unit / "model" / "config.json").exists()
