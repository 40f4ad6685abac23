"""A search from Python: a mapping, data of one's own, a call for every result."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from prunesweep.models import UserError, save
from prunesweep.search import run_search
from prunesweep.search.store.records import Result
from prunesweep.search.store.run import Run
from prunesweep.training import Data, Recipe, own_data
from prunesweep.training.jobs.training_job import TrainingJob, load_job
from prunesweep.training.named_code import MODULES, allowed_modules
from tests.generate import random_model
from tests.models.test_in_other_code import KINDS
from tests.search.in_process import without_ray
from tests.training.data.test_own import pair


@own_data
def cells() -> Data:
    return Data.of(*pair(60), classes=["a", "b", "c"])


def tables(source: Path, **search: Any) -> dict[str, Any]:
    return {
        "name": "own",
        "data": {"name": f"python:{__name__}:cells"},
        "source": {"model": f"local-dir:{source}"},
        "scores": {"method": "magnitude", "images": 8},
        "space": {"budget": [0.5, 0.9], "skip": [0, 1], "groups": {"embed": 1, "mlp": 1, "qk": 1, "v": 1}},
        "search": {"trials": 3, "recover": False, "screen_images": 8, **search},
        "finetune": {"epochs": 1, "batch_size": 12, "lr": 1e-3},
        "resources": {"cpus": 1},
    }


@pytest.mark.slow
def test_a_mapping_and_a_call_for_every_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    source = save(random_model(KINDS["attention"], 0, torch.float32), tmp_path / "source", classes=["a", "b", "c"])
    told: list[Result] = []
    result = run_search(tables(source), tmp_path / "run", on_trial=told.append, progress=True)
    assert result is not None
    assert result.finished
    assert sorted(one.id for one in told) == sorted(one.id for one in Run(tmp_path / "run").results())
    assert len(told) == 3
    assert f"python:{__name__}:cells: 60 train, 5 val, 3 classes (a .. c)" in capsys.readouterr().out
    run_search(tables(source), tmp_path / "again")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_modules_that_are_named_after_ray_began_are_seen_by_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a notebook that has called ``ray.init`` in its first cell."""
    import ray

    source = save(random_model(KINDS["attention"], 0, torch.float32), tmp_path / "source", classes=["a", "b", "c"])
    known = os.environ[MODULES]
    monkeypatch.delenv(MODULES)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    try:
        monkeypatch.setenv(MODULES, known)
        level = logging.getLogger("ray").level
        result = run_search(tables(source, trials=1), tmp_path / "run")
        assert result is not None
        assert len(result.front) == 1
        assert ray.is_initialized()
        assert logging.getLogger("ray").level == level
        assert not [one for one in caplog.records if one.name.startswith("ray.tune")]
    finally:
        ray.shutdown()


def test_a_training_job_says_which_modules_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(random_model(KINDS["attention"], 0, torch.float32), tmp_path / "source", classes=["a", "b", "c"])
    job = TrainingJob(str(source), f"python:{__name__}:cells", Recipe().model_dump(mode="json"))
    sent = json.loads(json.dumps(asdict(job)))
    monkeypatch.setenv(MODULES, "os")
    assert load_job(TrainingJob(**sent), "cpu").data.train_images == 60
    assert allowed_modules()[0] == "os"
    monkeypatch.setenv(MODULES, "os")
    with pytest.raises(UserError, match="names code, which a configuration alone does not run"):
        load_job(TrainingJob(**{**sent, "modules": []}), "cpu")


def test_a_mapping_is_checked_as_a_file_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)the configuration.*trails"):
        run_search(tables(tmp_path, trails=3), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
