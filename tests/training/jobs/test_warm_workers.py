"""Workers that stay for the next job: they train the same models, and what is lost meanwhile is started again."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from prunesweep.models import load, save
from prunesweep.training import Recipe, fit, open_data
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.ray_session import connected
from prunesweep.training.jobs.training_job import CannotBegin, Reports, TrainingJob
from prunesweep.training.jobs.warm_workers import Jobs, WarmWorkers

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
# images look the same in every epoch, so that any number of workers computes what one process does
RECIPE = Recipe(epochs=3, batch_size=154, optimizer="sgd", lr=0.005, weight_decay=0.0, fixed_view=True)


def distance(found: nn.Module, wanted: nn.Module) -> float:
    other = wanted.state_dict()
    return max((value - other[name]).abs().max().item() for name, value in found.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jobs_come_one_after_the_other(tmp_path: Path) -> None:
    """The second one on the processes of the first; a lost one and a job that cannot begin stop none of the others."""
    torch.manual_seed(0)
    source = save(timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE), tmp_path / "source")
    wanted = load(source)
    fit(wanted, open_data("digits"), RECIPE)
    workers, lost = list[list[int]](), False

    def note(text: str) -> None:
        nonlocal lost
        if re.match("2 workers: ", text):
            workers.append([int(pid) for pid in re.findall(r"process (\d+)", text)])
            if len(workers) == 3 and not lost:
                lost = True
                os.kill(workers[-1][1], signal.SIGKILL)

    job = TrainingJob(model=str(source), data="digits", recipe=RECIPE.model_dump(mode="json"))
    with connected(None, cpus=2, gpus=0):
        warm = WarmWorkers(Placement(2), tmp_path / "workers", idle=30)
        epochs = list[list[int]]()

        def train(name: str, job: TrainingJob = job) -> bool:
            epochs.append([])
            (tmp_path / name).mkdir()
            reports = Reports(on_epoch=lambda epoch: epochs[-1].append(epoch.epoch), on_note=note)
            return warm.train(
                job, tmp_path / name / "model", tmp_path / name / "state.safetensors", name=name, reports=reports
            )

        assert train("first")
        assert train("second")
        assert workers[0] == workers[1]
        assert train("third")  # of which one process is killed
        assert workers[2] == workers[0]
        assert not {*workers[3]} & {*workers[2]}
        with pytest.raises(CannotBegin, match="nowhere"):
            train("fourth", dataclasses.replace(job, model=str(tmp_path / "nowhere")))
        (tmp_path / "stop").touch()
        assert not train("fifth", dataclasses.replace(job, stop_file=str(tmp_path / "stop")))
        (tmp_path / "stop").unlink()
        assert epochs == [[1, 2, 3], [1, 2, 3], [1, 2, 3], [], [1]]
        assert warm.train(job, tmp_path / "fifth" / "model", tmp_path / "fifth" / "state.safetensors", name="fifth")
        warm.close()
        assert not list((tmp_path / "workers").iterdir())
    for name in ("first", "second", "third", "fifth"):
        assert distance(load(tmp_path / name / "model"), wanted) < 1e-5
        assert [path.name for path in (tmp_path / name).iterdir()] == ["model"]


def test_a_job_whose_workers_are_lost_again_and_again_fails_and_the_next_one_does_not() -> None:
    jobs = Jobs(attempts=2, idle=60)
    assert jobs.take() is None
    assert jobs.give({"name": "first"})
    assert jobs.take() == (1, {"name": "first"})
    assert jobs.take() == (1, {"name": "first"})  # its workers were started again
    jobs.raised(1, "ValueError: no")
    assert jobs.take() is None
    assert jobs.look(0)[1] == {"failed": "ValueError: no"}
    assert jobs.give({"name": "second"})
    jobs.raised(1, "of the job before")
    for _ in range(2):
        assert jobs.take() == (2, {"name": "second"})
    assert jobs.take() is None
    assert jobs.look(0)[1] == {"failed": "its workers were lost 2 times (out of memory, or killed)"}
    assert not jobs.ended()
    assert jobs.give({"name": "third"})
    jobs.end(2, {"done": True})  # told late
    assert jobs.look(0)[1] is None
    jobs.end(3, {"done": True})
    assert jobs.look(0)[1] == {"done": True}


def test_workers_end_that_have_had_no_job_for_long() -> None:
    jobs = Jobs(attempts=2, idle=0.0)
    time.sleep(0.01)
    assert jobs.take() is None
    assert jobs.ended()
    assert not jobs.give({"name": "too late"})
