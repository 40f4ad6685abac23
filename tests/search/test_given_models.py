"""Searches that start from saved models: those of ``prunesweep instant``, or other compressed forms of the source."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunesweep.launch.cli import app
from prunesweep.models import UserError, arch_of, build, cost, load, load_provenance, save
from prunesweep.models.io.objects import Objects
from prunesweep.search import run_search
from prunesweep.search.config import SearchConfig, parse_config
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.reopen import space_of
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.space.space import Space
from prunesweep.search.space.warm_start import start_points
from prunesweep.search.store.run import Run
from prunesweep.search.store.study import Study
from prunesweep.training import EVAL_BATCH, evaluate, open_data
from tests.conftest import TINY
from tests.launch.test_cli import call
from tests.object_store import serving
from tests.search.execution.test_task import nothing

Tiny = Callable[..., SearchConfig]
SHARES = ("0.7", "0.45", "0.2")  # the last one is below the tiny search's window


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Path:
    """A computed front of the tiny search's source."""
    source = prepare(parse_config(TINY, "tiny"), runs / "cache", nothing).folder
    out = tmp_path_factory.mktemp("instant") / "front"
    options = ["--data", "digits", "--images", "96", "--budgets", ",".join(SHARES), "--out", str(out)]
    app(["instant", str(source), *options], standalone_mode=False)
    return out


def begin(config: SearchConfig, cache: Path, path: Path) -> tuple[Run, SearchConfig]:
    """A run's folder with the points that its configuration asks to start from."""
    prepared = prepare(config, cache, nothing)
    points = tuple(dict(point) for point in start_points(config, prepared.space))
    config = config.model_copy(update={"search": config.search.model_copy(update={"start": points, "start_from": ()})})
    return Run(path), create_run(Run(path), config, prepared)


def coordinator_of(run: Run, config: SearchConfig) -> Coordinator:
    space = space_of(run, config)
    study = Study(run / "study.journal", space.distributions, 0, start=config.search.start)
    return Coordinator(run, study, space, config.search, max_concurrent=9, seed=0)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_computed_models_come_first_at_the_points_nearest_to_them(tiny: Tiny, runs: Path, front: Path) -> None:
    space = prepare(tiny(), runs / "cache", nothing).space
    with pytest.warns(UserWarning, match=r"left out: search.start_from .*/0.2: 0\.\d+ of the source's MACs: outside"):
        points = start_points(tiny(search={"start_from": str(front)}), space)
    for share, point in zip(SHARES[:2], points, strict=False):
        assert point["model"] == str(front / share)
        found = space.decode(point)
        assert found.arch == arch_of(load(front / share))
        assert point["budget"] == pytest.approx(found.cost.macs / space.source_cost.macs)
        assert point["skip"] == 0
    assert len(points) > 2
    assert "model" not in points[2]


def test_a_saved_model_and_several_folders_can_be_named(tiny: Tiny, runs: Path, front: Path) -> None:
    space = prepare(tiny(), runs / "cache", nothing).space
    names = [str(front / share) for share in SHARES[:2]]
    points = start_points(
        tiny(search={"start_from": [*names, names[0]], "start": [{"model": names[1], "lr": 1e-3}]}), space
    )
    assert [point.get("model") for point in points[:3]] == [names[1], *names]
    assert points[0]["lr"] == 1e-3


def test_what_a_search_starts_from_may_lie_in_a_store(
    tiny: Tiny, runs: Path, front: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A computed front, a saved model and a run give what they give in a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    space = prepare(tiny(), runs / "cache", nothing).space
    run, _ = begin(tiny(), runs / "cache", tmp_path / "run")
    coordinator = coordinator_of(run, tiny())
    unit = coordinator.next()
    assert unit is not None
    run_task(run.path, unit)
    with serving() as store:
        for name, place in (("front", front), ("run", run.path)):
            objects = Objects(store.url(f"starts/{name}"))
            for file in (path for path in place.rglob("*") if path.is_file() and not path.is_symlink()):
                objects.put(file.relative_to(place).as_posix(), file)

        def points(*given: object) -> list[dict[str, object]]:
            with warnings.catch_warnings(record=True):
                return [dict(p) for p in start_points(tiny(search={"start_from": [str(g) for g in given]}), space)]

        at_urls = points(*(store.url(f"starts/{name}") for name in ("front", f"front/{SHARES[0]}", "run")))
        in_folders = points(front, front / SHARES[0], run.path)
        assert len(at_urls) == len(in_folders)
        for mine, theirs in zip(at_urls, in_folders, strict=True):
            assert {**mine, "model": None} == {**theirs, "model": None}
            if "model" in theirs:
                assert same(load(str(mine["model"])), load(str(theirs["model"])))
        with pytest.warns(UserWarning, match=r"left out: search.start_from s3://bucket/starts/front/0.2: 0\.\d+ of"):
            start_points(tiny(search={"start_from": store.url("starts/front")}), space)
        with pytest.raises(UserError, match=r"search.start_from s3://bucket/nothing: .*nothing is there"):
            points(store.url("nothing"))


def test_models_of_another_kind_are_refused(tiny: Tiny, runs: Path, front: Path, tmp_path: Path) -> None:
    space = prepare(tiny(), runs / "cache", nothing).space
    save(build(dataclasses.replace(space.arch, num_classes=7)), tmp_path / "other")
    for where, message in (
        (tmp_path / "other", "num_classes = 7: the search's source has 10"),
        (front / SHARES[2], "of the source's MACs: outside space.budget"),
        (tmp_path, "is not a run"),
    ):
        with pytest.raises(UserError, match=message):
            start_points(tiny(search={"start_from": str(where)}), space)


def test_the_method_is_that_of_the_model_where_the_space_has_it(tiny: Tiny, runs: Path, front: Path) -> None:
    arch = prepare(tiny(), runs / "cache", nothing).arch
    for methods, expected in ((["taylor", "subspaces"], "subspaces"), (["taylor", "nvit"], "taylor")):
        config = tiny(space={"methods": methods}, search={"start_from": str(front / "0.7")})
        (point, *_) = start_points(config, Space.blank(config.space, arch, methods[0]))
        assert point["method"] == expected


def test_a_dry_run_refuses_what_the_search_would(tiny: Tiny, runs: Path, front: Path) -> None:
    with pytest.raises(UserError, match="of the source's MACs: outside space.budget"):
        run_search(tiny(search={"start_from": str(front / SHARES[2])}), runs / "dry", dry_run=True)
    assert not (runs / "dry").exists()


def test_a_trial_is_the_very_model_that_was_given(tiny: Tiny, runs: Path, front: Path, tmp_path: Path) -> None:
    shutil.copytree(front / "0.45", tmp_path / "0.45")
    config = tiny(search={"start_from": str(tmp_path / "0.45"), "rungs": [1, 2]})
    run, config = begin(config, runs / "cache", tmp_path / "run")
    shutil.rmtree(tmp_path / "0.45")  # the run needs nothing but its own folder
    coordinator = coordinator_of(run, config)
    unit = coordinator.next()
    assert unit is not None
    given = load(run / str(unit.given))
    assert same(given, load(front / "0.45"))
    assert unit.arch_hash == arch_of(given).hash

    again = coordinator_of(run, config).next()  # of a driver that died
    assert again == unit
    result = run_task(run.path, unit)["result"]
    assert result["zero_shot"] == evaluate(given, open_data("digits", search_split=0.2).val_loader(EVAL_BATCH))["top1"]
    assert (result["macs"], result["given"]) == (cost(arch_of(given)).macs, unit.given)
    trained = run.trial(unit.id) / "model"
    assert arch_of(load(trained)) == arch_of(given)
    assert not same(load(trained), given)
    assert load_provenance(trained)["given"] == unit.given
    assert load_provenance(trained)["method"] == "subspaces"
    higher = dataclasses.replace(unit, rung=1)
    run.trial(higher.id).mkdir()
    assert run_task(run.path, higher)["result"]["epochs"] == 3


def test_two_models_at_one_point_are_two_candidates(tiny: Tiny, runs: Path, front: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(front / "0.7", tmp_path / name)
    config = tiny(search={"start_from": [str(tmp_path / name) for name in "ab"]})
    run, config = begin(config, runs / "cache", tmp_path / "run")
    coordinator = coordinator_of(run, config)
    units = [coordinator.next() for _ in range(3)]
    assert [unit and unit.given for unit in units] == ["given/0", "given/1", None]
    for unit in units[:2]:
        assert unit is not None
        run_task(run.path, unit)
        coordinator.complete(unit.id)
    (run / "study.journal").unlink()  # it is made again from the files, and no model is proposed twice
    later = coordinator_of(run, config)
    assert [r.given for r in later.results] == ["given/0", "given/1"]
    rest: list[Any] = []
    while (unit := later.next()) is not None:
        rest.append(unit.given)
    assert rest == [None, None]


@pytest.mark.slow
def test_a_search_begins_with_a_computed_front(
    tiny: Tiny, runs: Path, front: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(search={"start_from": str(front), "trials": 3, "rungs": [0, 1]})
    result = run_search(config, runs / "given")
    assert result is not None
    assert result.finished
    run = Run(result.path)
    given = {r.given: r for r in run.results() if r.given is not None and r.rung == 0}
    assert {r.macs for r in given.values()} == {cost(arch_of(load(front / share))).macs for share in SHARES[:2]}
    for name in given:
        assert same(load(run / str(name)), load(front / ("0.7" if str(name).endswith("0") else "0.45")))
    code, text, _ = call(capsys, "front", run.path, "--json")
    assert code == 0
    assert json.loads(text)
