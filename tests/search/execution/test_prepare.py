"""What is made before the first trial, and a run that is whole in its folder."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prunesweep import training
from prunesweep.models import UserError, arch_of, load
from prunesweep.models.latency.building import macs_table
from prunesweep.search import resume_search, run_search
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.search.execution import source
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.elsewhere import Access, bring_prepared, prepare_part_there, prepare_there
from prunesweep.search.execution.prepare import SCORED, prepare_search
from prunesweep.search.execution.source import (
    Unshared,
    make_subspaces,
    open_checked,
    open_space,
    prepare,
    prepare_part,
)
from prunesweep.search.execution.task import WorkerContext, run_task
from prunesweep.search.store.run import Run
from prunesweep.training import evaluation, teacher_cache
from prunesweep.training.jobs.recovery import Known, Recovery
from prunesweep.training.task import DistillationTask
from tests.object_store import serving
from tests.search.execution.test_task import begin, nothing


def test_a_look_at_the_space_costs_the_same_on_any_data(
    tiny: Callable[..., SearchConfig], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(space={"conv": [0, 2]}, search={"screen_images": 96})
    prepare_search(config, runs / "cache", nothing)  # source and scores are there from now on
    looked, real = list[int](), training.evaluate

    def evaluate(
        model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], **options: Any
    ) -> dict[str, float]:
        looked.append(sum(len(labels) for _, labels, *_ in batches))
        return real(model, batches, **options)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    seen: list[tuple[str, float]] = []
    found = prepare_search(config, runs / "cache", lambda what, share, _: seen.append((what, share)))
    assert looked == [96] * SCORED
    assert 0 < found.zero_shot.low <= found.zero_shot.high <= 100
    assert {what for what, _ in seen} == {"scores from the cache", "sampling the space"}
    assert seen[-1][1] == 1


def test_what_a_worker_sends_back_is_small_and_enough(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path
) -> None:
    config = tiny()
    sent = pickle.dumps(prepare_search(config, runs / "cache", nothing))
    assert len(sent) < 100_000
    begun = pickle.loads(sent)
    space = open_space(config, begun)
    assert space.summarise(len(begun.summary.points), config.seed) == begun.summary
    run = Run(tmp_path / "run")
    create_run(run, config, begun)
    assert run.metadata()["source"]["top1"] == begun.figures.top1
    assert run.metadata()["source"]["macs"] == space.source_cost.macs
    assert set(run.metadata()["scores"]) == set(begun.score_files)
    load(run / "source")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="has just been made by another process"):
        create_run(run, config, begun)  # of two searches with one --out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_point_of_another_space_is_refused_before_there_is_a_run(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path
) -> None:
    config = tiny(search={"start": [{"budgte": 0.5}]})
    shutil.copytree(prepare_search(tiny(), runs / "cache", nothing).folder.parents[1], tmp_path / "cache")
    with pytest.raises(UserError, match="search.start: budgte: no variable of this space"):
        run_search(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_teacher_is_asked_once_before_the_first_unit(
    links: bool, tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError("no links here")))
    distill = [{"cache_teacher": True}, {"kind": "feature", "weight": 0.0}]
    config = tiny(finetune={"epochs": 1, "fixed_view": True, "distill": distill})
    shutil.copytree(prepare_search(tiny(), runs / "cache", nothing).folder.parents[1], tmp_path / "cache")
    shares: list[float] = []
    prepare_search(
        config, tmp_path / "cache", lambda what, share, _: shares.append(share) if "teacher" in what else None
    )
    assert len(shares) == 5  # 1,078 images in batches of 256
    assert (sorted(shares), shares[-1]) == (shares, 1.0)
    monkeypatch.setattr(DistillationTask, "answers", Mock(side_effect=AssertionError("asked again")))

    run, coordinator = begin(config, tmp_path / "cache", tmp_path / "run")
    (kept,) = (tmp_path / "cache" / "teacher_logits").rglob("*.safetensors")
    own = run.teacher_logits / kept.relative_to(tmp_path / "cache" / "teacher_logits")
    assert own.samefile(kept) == links
    assert own.read_bytes() == kept.read_bytes()
    unit = coordinator.next()
    assert unit is not None
    assert run_task(run.path, unit)["state"] == "finished"


def test_what_several_processes_make_together_is_what_one_makes(
    tiny: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and all; the one that goes on makes nothing again. Of few data one process makes everything."""
    config = tiny(finetune={"epochs": 1, "fixed_view": True, "distill": [{"cache_teacher": True}]})

    def made(cache: Path) -> dict[str, torch.Tensor]:
        files = [path for path in cache.rglob("*.safetensors") if path.parts[-3] != "sources"]
        read = {str(path.relative_to(cache)): load_file(path) for path in files}
        return {f"{file}:{name}": tensor for file, tensors in read.items() for name, tensor in tensors.items()}

    alone, together = tmp_path / "alone", tmp_path / "together"
    assert prepare(config, alone, nothing, share=3).teacher_logits
    for module in (source, teacher_cache):
        monkeypatch.setattr(module, "SHARD", 500)
    shutil.rmtree(alone / "teacher_logits")
    prepare(config, alone, nothing)
    shutil.copytree(alone / "sources", together / "sources")
    with pytest.raises(Unshared) as unshared:
        prepare(config, together, nothing, share=2)
    assert unshared.value.parts == 2
    told = list[str]()
    for part in (1, 0):
        prepare_part(config, together, lambda what, *_: told.append(what), part=part, parts=2)
    assert {what.rpartition(",")[2] for what in told} == {" part 1 of 2", " part 2 of 2"}
    parts = made(together)
    told.clear()
    kept = prepare(config, together, lambda what, *_: told.append(what), share=2)
    assert told == ["scores from the cache"] * 2
    make_subspaces(config, prepare(config, alone, nothing), alone, nothing)
    monkeypatch.setattr(Recovery, "calibration", Mock(return_value=()))  # no image is read
    assert make_subspaces(config, kept, together, nothing)
    assert not list((together / "scores").glob("*.parts"))
    whole, added_up = made(alone), made(together)
    assert len({name.partition(":")[0] for name in whole}) == 2 + 1 + 3  # widths, blocks; subspaces; 1,078 images
    assert set(added_up) == set(whole)
    for name, tensor in whole.items():
        if "subspaces" in name and ":units" not in name:  # sums, in another order
            rounding = 1e-14 * tensor.abs().max().item()
            torch.testing.assert_close(added_up[name], tensor, rtol=0, atol=rounding)
        else:
            assert torch.equal(added_up[name], tensor)
            assert "subspaces" in name or torch.equal(parts[name], tensor)


@pytest.mark.slow
def test_what_nodes_without_a_common_folder_make_together_is_what_one_makes(
    tiny: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the store, in which nothing stays; the one that goes on makes nothing again."""
    ours = {"epochs": 1, "fixed_view": True, "distill": [{"cache_teacher": True}]}
    config = tiny(finetune=ours, space={"latency_table": str(tmp_path / "table.json")})
    arch = arch_of(open_checked(tiny())[0])
    macs_table(arch, ms_per_gmac=1000.0).save(tmp_path / "elsewhere.json")
    for module in (source, teacher_cache):
        monkeypatch.setattr(module, "SHARD", 500)
    monkeypatch.setattr(Access, "here", False)
    told, cache = list[str](), tmp_path / "driver"

    def on(machine: str) -> Callable[..., None]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        told.clear()
        return lambda what, *_: told.append(what)

    with serving() as store:
        own = {"access": Access(store.url("prepared/run"), 1, "head")}
        own["table"] = (tmp_path / "elsewhere.json").read_text()
        assert prepare_there(config, cache, on("left"), share=2, **own) == 2
        for part, machine in enumerate(("left", "right")):
            prepare_part_there(config, cache, on(machine), part=part, parts=2, **own)
            assert not [what for what in told if what.startswith("training the source")] or machine == "left"
        assert not list(tmp_path.glob("right/**/*.parts/*"))
        for kind, name in ((Known, "of"), (DistillationTask, "answers")):
            monkeypatch.setattr(kind, name, Mock(side_effect=AssertionError("again")))
        found = prepare_there(config, cache, on("third"), **own)
        assert not isinstance(found, int)
        assert told.count("scores from the cache") == 2
        made = bring_prepared(own["access"].objects(), *found, cache)
        assert own["access"].objects().list() == {}
    monkeypatch.undo()
    for module in (source, teacher_cache):
        monkeypatch.setattr(module, "SHARD", 500)
    (tmp_path / "elsewhere.json").rename(tmp_path / "table.json")
    alone = prepare_search(config, tmp_path / "alone", nothing)
    assert made.summary == alone.summary
    assert made.zero_shot == alone.zero_shot
    mine, theirs = (
        {
            f"{path.relative_to(place)}:{name}": tensor
            for path in place.rglob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for place in (cache, tmp_path / "alone")
    )
    assert len({name.partition(":")[0] for name in theirs}) == 1 + 2 + 1 + 3  # source, scores, subspaces, answers
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        rounding = 1e-14 * tensor.double().abs().max().item() if "subspaces" in name and ":units" not in name else 0
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=rounding)


def test_no_teacher_is_asked_where_nothing_is_trained(
    tiny: Callable[..., SearchConfig], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistillationTask, "answers", Mock(side_effect=AssertionError("asked")))
    config = tiny(finetune={"epochs": 0, "fixed_view": True, "distill": [{"cache_teacher": True}]})
    assert prepare_search(config, runs / "cache", nothing).teacher_logits == ()


@pytest.mark.parametrize(("below", "shown"), [(True, "runs/a"), (False, None)])
def test_a_run_is_shown_as_it_would_be_typed(
    below: bool, shown: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path if below else tmp_path / "elsewhere")
    run = Run(tmp_path / "runs" / "a")
    assert run.shown == (shown or str(run.path))


@pytest.mark.slow
def test_a_run_needs_nothing_outside_its_folder(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made with a latency table and from another run's front, both of which are gone when it goes on, moved."""
    other, coordinator = begin(tiny(), runs / "cache", tmp_path / "other")
    unit = coordinator.next()
    assert unit is not None
    run_task(other.path, unit)
    begun = prepare_search(tiny(), runs / "cache", nothing)
    macs_table(begun.arch, ms_per_gmac=1000.0).save(tmp_path / "table.json")
    shutil.copytree(runs / "cache", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    config = tiny(space={"latency_table": "table.json"}, search={"trials": 1, "start_from": "other"})
    result = run_search(config, "first")
    assert result is not None
    monkeypatch.chdir("/")
    shutil.rmtree(other.path)
    (tmp_path / "table.json").unlink()
    (tmp_path / "first").rename(tmp_path / "second")
    assert WorkerContext(Run(tmp_path / "second")).latency is not None  # as on a node with a folder of its own

    assert resume_search(tmp_path / "second", trials=2).finished
    run = Run(tmp_path / "second")
    assert run.results()[0].point == unit.point
    assert all(r.latency_ms for r in run.results())
    now = load_config(run / "search.toml")
    assert now.space.latency_table == str(run.latency_table)
    assert now.search.start_from == ()
