"""Finetuning on Ray Train: the one training loop as every worker of a process group, on one node or many.

A run is named by what it does; the same job under the same storage goes on from its last checkpoint, whether a worker,
a node or the driver was lost. Ray has to be initialised.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the controller's next look
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import ray.train  # noqa: E402
from ray.train import (  # noqa: E402
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device  # noqa: E402

from models import load, save  # noqa: E402
from models.files import publish_folder  # noqa: E402

from .data import open_data  # noqa: E402
from .loop import Diverged, Epoch, fit  # noqa: E402
from .recipe import Recipe  # noqa: E402

__all__ = ["FinetuneJob", "TrainingFailed", "Workers", "finetune_on_ray"]

STATE, MODEL = "state.safetensors", "model"


@dataclass(frozen=True)
class FinetuneJob:
    """What is trained: paths of saved models that every node can read, and what ``fit`` needs; all JSON-ready."""

    model: str
    data: str
    recipe: Mapping[str, Any]
    teacher: str | None = None
    seed: int = 0
    loader_workers: int = 0


@dataclass(frozen=True)
class Workers:
    """How many processes train together, and what each of them has."""

    number: int = 1
    cpus: float = 1
    gpus: float = 0


class TrainingFailed(Exception):
    """Training ended with an error that another attempt would not mend."""


def finetune_on_ray(
    job: FinetuneJob,
    workers: Workers,
    out: Path,
    *,
    storage: str,
    name: str,
    provenance: Mapping[str, Any] | None = None,
    max_failures: int = 3,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Path:
    """Train ``job`` and publish the model as the folder ``out``.

    Args:
        job: what is trained.
        workers: the process group.
        out: folder of the trained model, on the machine that calls this.
        storage: absolute path or URI that all nodes can write to (local for one node, NFS, s3://...).
        name: of the run under ``storage``; a run of this name that is there is gone on with.
        provenance: facts for the model's ``config.json``.
        max_failures: attempts after the first one; each goes on from the last checkpoint.
        on_epoch: called, in this process, after every epoch that is new.

    Raises:
        TrainingFailed: the loss diverged, or the attempts are used up.
    """
    with _epochs(on_epoch) as log:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": asdict(job), "provenance": dict(provenance or {}), "log": log},
            scaling_config=ScalingConfig(
                num_workers=workers.number,
                use_gpu=workers.gpus > 0,
                resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=5),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
            torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo", timeout_s=300),
        )
        try:
            result = trainer.fit()
        except Exception as error:  # Ray wraps whatever a worker raised
            raise TrainingFailed(str(error)) from error
    if "failed" in result.return_value:
        raise TrainingFailed(result.return_value["failed"])
    with result.checkpoint.as_directory() as folder, publish_folder(out) as target:
        shutil.copytree(Path(folder) / MODEL, target, dirs_exist_ok=True)
    return out


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs."""
    job = FinetuneJob(**config["job"])
    first = ray.train.get_context().get_world_rank() == 0
    device = get_device()
    model: Any = load(job.model).to(device)
    teacher = None if job.teacher is None else load(job.teacher).to(device)
    data = open_data(job.data, model.pretrained_cfg, loader_workers=job.loader_workers)
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch) / STATE
        kept = ray.train.get_checkpoint()
        if kept is not None:
            with kept.as_directory() as folder:
                if (Path(folder) / STATE).exists():
                    shutil.copy(Path(folder) / STATE, state)

        def report(facts: dict[str, Any], *, final: bool = False) -> None:
            checkpoint = None
            if first:
                folder = tempfile.mkdtemp()  # Ray deletes it once it is uploaded
                if state.exists():
                    shutil.copy(state, folder)
                if final:
                    save(model.cpu(), Path(folder) / MODEL, {**config["provenance"], **facts})
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(facts, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)

        last: dict[str, Any] = {}

        def on_epoch(epoch: Epoch) -> None:
            last.update(top1=epoch.top1)
            if first:
                config["log"].add.remote(asdict(epoch))
            report(asdict(epoch))

        recipe = Recipe.model_validate(job.recipe)
        try:
            fit(model, data, recipe, teacher=teacher, seed=job.seed, state=state, on_epoch=on_epoch)
        except Diverged as error:  # another attempt would end the same way
            return {"failed": str(error)}
        report(last, final=True)
    return last


@ray.remote(num_cpus=0)
class _Log:
    """Epochs that the first worker has finished, for whoever watches."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []

    def add(self, epoch: dict[str, Any]) -> None:
        self.epochs.append(epoch)

    def since(self, count: int) -> list[dict[str, Any]]:
        return self.epochs[count:]


@contextlib.contextmanager
def _epochs(on_epoch: Callable[[Epoch], None] | None) -> Iterator[Any]:
    """An actor that workers tell their epochs; ``on_epoch`` hears of them in this process, from a thread."""
    log = _Log.remote()  # type: ignore[attr-defined]
    ended, heard = threading.Event(), 0

    def listen() -> None:
        nonlocal heard
        over = False
        while not over:
            over = ended.wait(0.5)
            for epoch in ray.get(log.since.remote(heard)):
                heard += 1
                if on_epoch:
                    on_epoch(Epoch(**epoch))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        ended.set()
        thread.join(timeout=10)
        ray.kill(log)
