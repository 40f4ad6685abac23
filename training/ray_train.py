"""Finetuning on Ray Train: the one training loop as every worker of a process group, on one node or many.

A run is named by what it does; the same job under the same storage goes on from its last checkpoint, whether a worker,
a node or the driver was lost, and with as many workers as there are between ``Workers.least`` and ``Workers.number``.
Every update sees the same images whatever their number. Ray has to be initialised.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the controller's next look
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",  # also what a node's death costs where Ray still counts on it
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import ray.train  # noqa: E402
from pyarrow.fs import FileSelector, FileType  # type: ignore[import-untyped]  # noqa: E402
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from prunesweep.models import load, save  # noqa: E402
from prunesweep.models.io.files import publish_folder  # noqa: E402
from prunesweep.pruners.hook import Collapsed, Hook  # noqa: E402

from .data import open_data  # noqa: E402
from .evaluation import Quality  # noqa: E402
from .loop import Epoch, fit  # noqa: E402
from .prune import PruneJob, prune_while_training  # noqa: E402
from .recipe import Recipe  # noqa: E402
from .second_stage import SecondStageJob  # noqa: E402
from .trainer import Diverged, DoesNotFit  # noqa: E402

__all__ = ["FinetuneJob", "TrainingFailed", "Workers", "finetune_on_ray"]

STATE, MODEL = "state.safetensors", "model"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class FinetuneJob:
    """What is trained: paths of saved models that every node can read, and what ``fit`` needs; all JSON-ready."""

    model: str
    data: str
    recipe: Mapping[str, Any]
    teacher: str | None = None
    teacher_cache: str | None = None  # see ``fit``
    seed: int = 0
    loader_workers: int = 0
    stop_file: str | None = None  # training ends after an epoch once this is there
    prune: Mapping[str, Any] | None = None  # ``PruneJob``: a method decides meanwhile, and what is published is cut
    second_stage: Mapping[str, Any] | None = None  # ``SecondStageJob``: the method's own way of finetuning


@dataclass(frozen=True)
class Workers:
    """How many processes train together, and what each of them has.

    With ``least``, training goes on with that many where a node is lost, and with more again, up to ``number``, once
    there is room for them (Ray looks every minute); each change restarts the workers from the last checkpoint.
    """

    number: int = 1
    cpus: float = 1
    gpus: float = 0
    least: int | None = None


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
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> bool:
    """Train ``job`` and publish the model as the folder ``out``; False where its stop file ended it.

    A method with several budgets publishes several models, in folders of ``out`` named by their budgets.

    Args:
        job: what is trained.
        workers: the process group.
        out: folder of the trained model, on the machine that calls this.
        storage: absolute path or URI that all nodes can write to (local for one node, NFS, s3://...).
        name: of the run under ``storage``; a run of this name that is there is gone on with.
        provenance: facts for the model's ``config.json``.
        max_failures: attempts after the first one; each goes on from the last checkpoint.
        on_step, on_epoch, on_note: as for ``fit``, called in this process: about once a second, after every epoch, and
            with the processes that train whenever they were started.

    Raises:
        TrainingFailed: the loss diverged, memory is too small, or the attempts are used up.
    """
    with _listening(on_step, on_epoch, on_note) as log:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": asdict(job), "provenance": dict(provenance or {}), "log": log},
            scaling_config=ScalingConfig(
                num_workers=workers.number if workers.least is None else (workers.least, workers.number),
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
    if "stopped" in result.return_value:
        return False
    with result.checkpoint.as_directory() as folder, publish_folder(out) as target:
        shutil.copytree(Path(folder) / MODEL, target, dirs_exist_ok=True)
    _drop_orphans(result)
    return True


def _drop_orphans(result: ray.train.Result) -> None:
    """Delete what was being written when a worker or the driver died: Ray neither uses nor deletes it."""
    kept = {Path(registered.path).name for registered, _ in result.best_checkpoints}
    for found in result.filesystem.get_file_info(FileSelector(result.path)):
        checkpoint = found.type == FileType.Directory and found.base_name.startswith("checkpoint_")
        if checkpoint and found.base_name not in kept:
            result.filesystem.delete_dir(found.path)


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs."""
    job, log = FinetuneJob(**config["job"]), config["log"]
    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    where = f"{ray.util.get_node_ip_address()} process {os.getpid()}"
    log.started.remote(context.get_world_rank(), context.get_world_size(), where)
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

        def report(facts: dict[str, Any], made: Mapping[str, tuple[Any, dict[str, Any]]] = NOTHING) -> None:
            checkpoint = None
            if first:
                folder = tempfile.mkdtemp()  # Ray deletes it once it is uploaded
                if state.exists():
                    shutil.copy(state, folder)
                for where, (result, more) in made.items():
                    save(result.cpu(), Path(folder) / MODEL / where, {**config["provenance"], **more})
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(facts, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)

        last: dict[str, Any] = {}

        def on_epoch(epoch: Epoch) -> None:
            last.update(Quality.of(asdict(epoch)).facts)
            if first:
                log.epoch.remote(asdict(epoch))
            report(asdict(epoch))

        reports: dict[str, Any] = {"on_epoch": on_epoch}
        if first:
            reports |= {"on_step": _seldom(log.step.remote), "on_note": log.note.remote}
        cache = None if job.teacher_cache is None else Path(job.teacher_cache)
        recipe = Recipe.model_validate(job.recipe)
        options = {"seed": job.seed, "state": state, "teacher_cache": cache, **reports}
        if job.stop_file is not None:
            options["should_stop"] = Path(job.stop_file).exists
        try:
            if job.prune is not None:
                found = prune_while_training(model, data, recipe, PruneJob(**job.prune), **options)
                several = found is not None and len(found) > 1
                made = {f"{m.budget:.4g}" if several else "": m for m in found or ()}
                models = {where: (m.model, dict(m.facts)) for where, m in made.items()}
            else:
                stage = None if job.second_stage is None else SecondStageJob(**job.second_stage)
                hook = Hook() if stage is None else stage.hook(job.model, job.teacher)
                finished = fit(model, data, recipe, teacher=teacher, hook=hook, **options)
                if finished:
                    hook.finish()
                models = {"": (model, last)} if finished else {}
        except (Collapsed, Diverged, DoesNotFit) as error:  # on all workers; another attempt would end the same way
            return {"failed": str(error)}
        if not models:
            return {"stopped": True}
        report(last, models)
    return last


def _seldom(call: Callable[..., Any], seconds: float = 1.0) -> Callable[..., None]:
    """``call``, but not again before ``seconds`` have passed."""
    due = 0.0

    def maybe(*arguments: Any) -> None:
        nonlocal due
        if time.monotonic() >= due:
            call(*arguments)
            due = time.monotonic() + seconds

    return maybe


@ray.remote(num_cpus=0)
class _Log:
    """What the workers have to say, for whoever watches."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []  # what may not get lost, in order
        self.latest: tuple[int, int, float] | None = None
        self.present: dict[int, str] = {}
        self.size = 0

    def started(self, rank: int, size: int, where: str) -> None:
        if size != self.size:
            self.size, self.present = size, {}
        self.present[rank] = where
        if len(self.present) == size:
            places = ", ".join(self.present[r] for r in range(size))
            self.note(f"{size} worker{'s' if size > 1 else ''}: {places}")
            self.present = {}

    def step(self, done: int, total: int, loss: float) -> None:
        self.latest = (done, total, loss)

    def epoch(self, epoch: dict[str, Any]) -> None:
        self.said.append(("epoch", epoch))

    def note(self, text: str) -> None:
        self.said.append(("note", text))

    def since(self, count: int) -> tuple[list[tuple[str, Any]], tuple[int, int, float] | None]:
        latest, self.latest = self.latest, None
        return self.said[count:], latest


@contextlib.contextmanager
def _listening(
    on_step: Callable[[int, int, float], None] | None,
    on_epoch: Callable[[Epoch], None] | None,
    on_note: Callable[[str], None] | None,
) -> Iterator[Any]:
    """An actor, on this node, that workers talk to; the callables hear of it in this process, from a thread."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    log = _Log.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    ended, heard = threading.Event(), 0

    def listen() -> None:
        nonlocal heard
        over = False
        while not over:
            over = ended.wait(0.5)
            said, latest = ray.get(log.since.remote(heard))
            heard += len(said)
            for kind, what in said:
                if kind == "epoch" and on_epoch:
                    on_epoch(Epoch(**what))
                if kind == "note" and on_note:
                    on_note(what)
            if latest and on_step:
                on_step(*latest)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        ended.set()
        thread.join(timeout=10)
        ray.kill(log)
