"""Train on Ray Train: every worker of a process group, on one node or many, runs the one training loop.

A run is named by what it does. The same job under the same storage is resumed from its last checkpoint, whether a
worker, a node or the driver was lost, and with any number of workers between ``min_workers`` and ``workers`` of the
placement. Every update sees the same images whatever their number. Ray has to be initialised.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the controller's next look
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",  # also what a node's death costs where Ray still counts on it
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import ray.train  # noqa: E402
import torch  # noqa: E402
from pyarrow.fs import FileSelector, FileSystem, FileType  # type: ignore[import-untyped]  # noqa: E402
from ray.exceptions import GetTimeoutError, RayActorError  # noqa: E402
from ray.train import (  # noqa: E402
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from prunesweep.models import UserError, save  # noqa: E402
from prunesweep.models.io.files import publish_folder  # noqa: E402
from prunesweep.models.io.objects import Objects, is_url  # noqa: E402
from prunesweep.models.io.scratch import scratch_folder  # noqa: E402
from prunesweep.pruners.hook import Collapsed  # noqa: E402

from ..loop import Epoch  # noqa: E402
from ..trainer import Diverged, DoesNotFit  # noqa: E402
from .placement import Placement  # noqa: E402
from .ray_session import alive, free_places, owned  # noqa: E402
from .training_job import (  # noqa: E402
    STATE,
    CannotBegin,
    Inputs,
    LoadedJob,
    Reports,
    TrainedModels,
    TrainingJob,
    load_job,
    train_models,
)

__all__ = [
    "Heard",
    "QuietTrainer",
    "TrainingFailed",
    "backend_of",
    "drop_torn_snapshot",
    "load_together",
    "pass_on",
    "process_lost",
    "seldom",
    "storage_of",
    "train_on_ray",
    "train_together",
]

MODEL = "model"  # folder of the trained models in a checkpoint
SNAPSHOT = "checkpoint_manager_snapshot.json"
UPLOAD = "checkpoint-"  # prefix of folders that Ray uploads
ABORT = 10.0  # seconds for training to end after Ctrl-C
RESTARTS = 2  # of what directs the workers, where its process was lost


class TrainingFailed(Exception):
    """Training ended with an error that another attempt would not mend."""


def backend_of(gpus: float) -> str:
    """The library that gradients travel by; NCCL refuses workers that share a GPU."""
    return "nccl" if gpus >= 1 else "gloo"


class QuietTrainer(TorchTrainer):  # type: ignore[misc]
    """Ray's trainer, which leaves Ctrl-C to its caller; Ray's own handler ends the process with exit code 0 or 1."""

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """End the processes that train, within seconds, and what directs them."""
        with contextlib.suppress(AttributeError, RayActorError, GetTimeoutError):
            ray.get(self.controller.abort.remote(), timeout=ABORT)


def train_on_ray(
    job: TrainingJob,
    placement: Placement,
    out: Path,
    *,
    storage: str,
    name: str,
    provenance: Mapping[str, Any] | None = None,
    max_failures: int = 3,
    inputs: Inputs | None = None,
    reports: Reports = Reports(),  # noqa: B008 (frozen)
) -> bool:
    """Train ``job`` on Ray Train's workers and publish the model as the folder ``out``.

    A method with several budgets publishes several models, in folders of ``out`` named by their budgets.

    Args:
        job: what is trained.
        placement: number of workers and the resources of each; Ray has to be initialised.
        out: folder of the trained model, on the machine that calls this.
        storage: absolute path or URI that all nodes can write to (local for one node, NFS, s3://...).
        name: the run's name under ``storage``; an existing run of this name is resumed.
        provenance: metadata for the model's ``config.json``.
        max_failures: attempts after the first one; each resumes from the last checkpoint.
        inputs: where the job's folders are for nodes that do not see them; they see them by default.
        reports: called in this process: about once a second with the steps, after every epoch, and whenever the
            processes that train were started.

    Returns:
        False if the job's stop file ended training.

    Raises:
        Diverged: the loss is not finite.
        CannotBegin: a worker misses the models or the data.
        TrainingFailed: memory is too small, or the attempts are used up.
    """
    least = placement.min_workers
    with _listening(reports) as log:
        trainer = QuietTrainer(
            _work,
            train_loop_config={
                "job": asdict(job),
                "provenance": dict(provenance or {}),
                "log": log,
                "inputs": inputs,
            },
            scaling_config=ScalingConfig(
                num_workers=placement.workers if least is None else (least, placement.workers),
                use_gpu=placement.gpus > 0,
                resources_per_worker={"CPU": placement.cpus, **({"GPU": placement.gpus} if placement.gpus else {})},
            ),
            run_config=RunConfig(
                name=name,
                **storage_of(storage),
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=5),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
            torch_config=TorchConfig(backend=backend_of(placement.gpus), timeout_s=300),
        )
        result = _fit(trainer, storage, name)
    if "missing" in result.return_value:
        raise CannotBegin(result.return_value["missing"])
    if "diverged" in result.return_value:
        raise Diverged(result.return_value["diverged"])
    if "failed" in result.return_value:
        raise TrainingFailed(result.return_value["failed"])
    if "stopped" in result.return_value:
        return False
    with result.checkpoint.as_directory() as folder, publish_folder(out) as target:
        shutil.copytree(Path(folder) / MODEL, target, dirs_exist_ok=True)
    _drop_orphans(result)
    return True


def _fit(trainer: QuietTrainer, storage: str, name: str) -> ray.train.Result:
    """Train; where the process that directs the workers was lost, once more from the last checkpoint."""
    for attempt in range(RESTARTS + 1):
        drop_torn_snapshot(storage, name)
        try:
            return trainer.fit()
        except KeyboardInterrupt:
            if not owned():  # a Ray of our own ends with all of them
                trainer.abort()
            raise
        except (RayActorError, ControllerError) as error:  # the second one: of a worker, lost before it began
            if attempt == RESTARTS or not process_lost(error) or not alive():
                raise TrainingFailed(str(error)) from error
            free_places()
        except Exception as error:  # Ray wraps the error of a worker
            raise TrainingFailed(str(error)) from error
    raise AssertionError  # the last attempt has returned or raised


def process_lost(error: BaseException) -> bool:
    """Whether an error of Ray's trainer means that what directs the workers was lost, or a worker before it began."""
    return isinstance(error, RayActorError) or isinstance(getattr(error, "controller_failure", None), RayActorError)


def drop_torn_snapshot(storage: str, name: str) -> None:
    """Delete Ray's list of a run's checkpoints where it is no JSON: Ray writes it in place, and starts with none else.

    Training then begins anew, and ends the same.

    Args:
        storage: as for ``train_on_ray``.
        name: as for ``train_on_ray``.
    """
    found = storage_of(storage)
    files, place = found.get("storage_filesystem"), found["storage_path"]
    if files is None:
        files, place = FileSystem.from_uri(place)
    path = f"{place}/{name}/{SNAPSHOT}"
    if files.get_file_info(path).type == FileType.File:
        with files.open_input_stream(path) as file:
            content = file.read()
        try:
            json.loads(content)
        except ValueError:
            files.delete_file(path)


def storage_of(place: str | Path) -> dict[str, Any]:
    """What Ray's ``RunConfig`` is told of where it may write: of a URL, the file system that we open."""
    if not is_url(place):
        return {"storage_path": str(place)}
    files, below = Objects(str(place)).opened
    return {"storage_path": below, "storage_filesystem": files}


def _drop_orphans(result: ray.train.Result) -> None:
    """Delete what was being written when a worker or the driver died; Ray neither uses nor deletes it."""
    kept = {Path(registered.path).name for registered, _ in result.best_checkpoints}
    for found in result.filesystem.get_file_info(FileSelector(result.path)):
        checkpoint = found.type == FileType.Directory and found.base_name.startswith("checkpoint_")
        if checkpoint and found.base_name not in kept:
            result.filesystem.delete_dir(found.path)


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """Train as one of the workers; the first one uploads checkpoints, and with the last of them the models."""
    job, log, inputs = TrainingJob(**config["job"]), config["log"], config["inputs"]
    with scratch_folder() as scratch:
        bring = None
        if inputs is not None:
            job = inputs.seen_from(job, scratch)
            bring = partial(inputs.bring, job, scratch)
        loaded, missing = load_together(job, log, bring)
        if loaded is None:
            return {"missing": missing}
        state = scratch / STATE
        _restore(state)

        models, outcome = train_together(job, loaded, log, state, lambda epoch: _report(asdict(epoch), state, {}))
        if outcome is not None:
            return outcome
        if models is None:
            _wait_for_uploads(scratch)
            return {"stopped": True}
        described = {where: (model, {**config["provenance"], **figures}) for where, (model, figures) in models.items()}
        figures = next(iter(models.values()))[1]
        _report(figures, state, described)
        _wait_for_uploads(scratch)
    return figures


def load_together(
    job: TrainingJob, heard: Any, bring: Callable[[], None] | None = None
) -> tuple[LoadedJob | None, str | None]:
    """Load the job on all workers, or learn on all of them what one misses: alone it would leave the others waiting.

    Args:
        job: what is trained.
        heard: the actor, a ``Heard``, that is told where this worker has begun.
        bring: is called first, where the job's files are not on this node yet.
    """
    context = ray.train.get_context()
    where = f"{ray.util.get_node_ip_address()} process {os.getpid()}"
    heard.started.remote(context.get_world_rank(), context.get_world_size(), where)
    loaded, missing = None, None
    try:
        if bring is not None:
            bring()
        loaded = load_job(job, get_device())
    except UserError as error:
        missing = f"{where}: {error}"
    found = [missing] * context.get_world_size()
    if len(found) > 1:
        torch.distributed.all_gather_object(found, missing)
    first = next((text for text in found if text), None)
    return (loaded, None) if first is None else (None, first)


def train_together(
    job: TrainingJob, loaded: LoadedJob, heard: Any, state: Path, report: Callable[[Epoch], None]
) -> tuple[TrainedModels | None, dict[str, Any] | None]:
    """Train as one of the workers; the first one tells of steps, epochs and notes.

    Args:
        job, loaded, state: as for ``train_models``.
        heard: the actor, a ``Heard``, that is told.
        report: called on every worker after an epoch.

    Returns:
        What ``train_models`` gives, and how the training ended where another attempt would end the same way.
    """
    first = ray.train.get_context().get_world_rank() == 0

    def on_epoch(epoch: Epoch) -> None:
        if first:
            heard.epoch.remote(asdict(epoch))
        report(epoch)

    reports = Reports(on_epoch=on_epoch)
    if first:
        reports = Reports(seldom(heard.step.remote), on_epoch, heard.note.remote)
    try:
        return train_models(job, loaded, state=state, reports=reports), None
    except Diverged as error:  # on all workers
        return None, {"diverged": str(error)}
    except (Collapsed, DoesNotFit) as error:  # likewise
        return None, {"failed": str(error)}


def _restore(state: Path) -> None:
    """Copy the training's state from the last checkpoint to ``state``, if there is one."""
    kept = ray.train.get_checkpoint()
    if kept is not None:
        with kept.as_directory() as folder:
            if (Path(folder) / STATE).exists():
                shutil.copy(Path(folder) / STATE, state)


def _report(metrics: dict[str, Any], state: Path, models: TrainedModels) -> None:
    """Report to Ray on all workers; the first one adds a checkpoint of the state and the models."""
    checkpoint = None
    if ray.train.get_context().get_world_rank() == 0:
        folder = tempfile.mkdtemp(prefix=UPLOAD, dir=state.parent)  # Ray deletes it once it is uploaded
        if state.exists():
            shutil.copy(state, folder)
        for where, (model, provenance) in models.items():
            save(model.cpu(), Path(folder) / MODEL / where, provenance)
        checkpoint = Checkpoint.from_directory(folder)
    ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)


def _wait_for_uploads(scratch: Path) -> None:
    """Wait until Ray has uploaded, and deleted, all checkpoints that were reported to it."""
    while any(scratch.glob(f"{UPLOAD}*")):
        time.sleep(0.05)


def seldom(call: Callable[..., Any], seconds: float = 1.0) -> Callable[..., None]:
    """Return a function that passes calls on to ``call``, at most one in ``seconds``."""
    due = 0.0

    def maybe(*arguments: Any) -> None:
        nonlocal due
        if time.monotonic() >= due:
            call(*arguments)
            due = time.monotonic() + seconds

    return maybe


class Heard:
    """What the workers report, kept in an actor for the process that started them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []  # reports that must not get lost, in order
        self.latest: tuple[int, int, float] | None = None
        self.ready: dict[int, str] = {}
        self.size = 0

    def started(self, rank: int, size: int, where: str) -> None:
        if size != self.size:
            self.size, self.ready = size, {}
        self.ready[rank] = where
        if len(self.ready) == size:
            places = ", ".join(self.ready[r] for r in range(size))
            self.note(f"{size} worker{'s' if size > 1 else ''}: {places}")
            self.ready = {}

    def step(self, done: int, total: int, loss: float) -> None:
        self.latest = (done, total, loss)

    def epoch(self, epoch: dict[str, Any]) -> None:
        self.events.append(("epoch", epoch))

    def note(self, text: str) -> None:
        self.events.append(("note", text))

    def since(self, count: int) -> tuple[list[tuple[str, Any]], tuple[int, int, float] | None]:
        latest, self.latest = self.latest, None
        return self.events[count:], latest


_Log = ray.remote(num_cpus=0, max_restarts=-1)(Heard)


def pass_on(found: tuple[list[tuple[str, Any]], tuple[int, int, float] | None], reports: Reports) -> int:
    """Call the functions of ``reports`` with what ``Heard.since`` gave; return the number of events."""
    events, latest = found
    for kind, what in events:
        if kind == "epoch" and reports.on_epoch:
            reports.on_epoch(Epoch(**what))
        if kind == "note" and reports.on_note:
            reports.on_note(what)
    if latest and reports.on_step:
        reports.on_step(*latest)
    return len(events)


@contextlib.contextmanager
def _listening(reports: Reports) -> Iterator[Any]:
    """Start an actor on this node that workers report to; pass its reports on in this process, from a thread."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    log = _Log.options(scheduling_strategy=here).remote()
    ended, heard = threading.Event(), 0

    def listen() -> None:
        nonlocal heard
        over = False
        while not over:
            over = ended.wait(0.5)
            try:
                found = ray.get(log.since.remote(heard))
            except RayActorError:  # its process was lost, with what was not heard of yet; Ray starts another one
                heard = 0
                continue
            heard += pass_on(found, reports)

    thread, patience = threading.Thread(target=listen, daemon=True), 10.0
    thread.start()
    try:
        yield log
    except KeyboardInterrupt:
        patience = 0.0
        raise
    finally:
        ended.set()
        thread.join(timeout=patience)
        ray.kill(log)
