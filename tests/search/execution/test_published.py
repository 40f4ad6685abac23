"""All that a search keeps is on the disk before it has its name: runs, their caches, and a journal made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.task import run_task
from tests.publishing import watched
from tests.search.execution.test_task import begin

APPENDED = ("metrics.jsonl", "study.journal")  # a line at a time; the journal is synced by Optuna


def test_every_file_of_a_run_and_of_its_cache_is_published(tiny: Callable[..., SearchConfig], tmp_path: Path) -> None:
    config = tiny(
        search={"trials": 3, "rungs": [0, 2], "reduction_factor": 2, "recover_images": 64},
        finetune={"batch_size": 128, "distill": [{"cache_teacher": True}], "fixed_view": True},
    )
    with watched() as watch:
        run, coordinator = begin(config, tmp_path / "cache", tmp_path / "run")
        while (unit := coordinator.next()) is not None:
            assert run_task(run.path, unit)["state"] == "finished"
            coordinator.complete(unit.id)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and "tb" not in p.parts and p.name not in APPENDED]
    kinds = {p.relative_to(tmp_path).parts[:2] for p in files}
    assert kinds >= {("cache", "sources"), ("cache", "scores"), ("cache", "teacher_logits"), ("run", "trials")}
    assert [p for p in files if not watch.covers(p)] == []
    assert any(run.path in p.parents and p.name == "state.safetensors" for p in watch.published)
    assert any(p.name.startswith("subspaces-") for p in watch.published)
    assert any(p.name == "front.json" for p in watch.published)
