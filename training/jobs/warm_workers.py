"""Workers that train one job after the other in one run of Ray Train: only the first waits for them to start.

A run of Ray Train takes 13 to 30 s to start its processes, to join them and to end, whatever is trained. So in the
function that Ray Train runs on the workers, the first one asks an actor for the next job, all of them train it, and it
asks again, until none has come for a while. Ray Train starts them anew when one is lost, on whatever nodes are there;
then they go on with the job that was not done, from the state in its folder, which all nodes see, or which each of them
brings from where it is (``Elsewhere``).
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prunesweep.models import UserError, save
from prunesweep.models.io.files import publish_folder
from prunesweep.models.io.objects import Objects, is_url
from prunesweep.models.io.scratch import scratch_folder

from ..trainer import Diverged
from .placement import Placement
from .ray_session import alive, free_places
from .ray_workers import (
    Heard,
    QuietTrainer,
    TrainingFailed,
    backend_of,
    load_together,
    pass_on,
    process_lost,
    storage_of,
    train_together,
)
from .training_job import STATE, CannotBegin, Inputs, Reports, TrainingJob

__all__ = ["Elsewhere", "Jobs", "WarmWorkers", "close_workers", "workers_for"]

IDLE = 60.0  # seconds without a job after which the workers give their places back
ASK, LOOK = 0.1, 0.2  # seconds between two questions for a job, and between two looks at what was reported
MADE = "made"  # folder of a trained model that is handed in
END = 20.0  # seconds for the workers to end when they are told to
RESTARTS = 2  # of what directs the workers, where its process was lost, for each job


class Elsewhere(Inputs, Protocol):
    """Where a job's files and what becomes of it are, for workers that do not see the folders of who hands it over.

    What fails here is no fault of the job's: all methods raise CannotBegin. ``bring`` brings the job's state, too.
    """

    def give(self, job: TrainingJob) -> None:
        """Let workers find what the job begins with; called by who hands it over."""

    def take(self, out: Path) -> None:
        """Bring the trained model as the folder ``out``, and forget the job; called by who handed it over."""

    def forget(self) -> None:
        """Delete all that was kept of the job, which has ended; called by who handed it over."""

    def carrying(self, job: TrainingJob, folder: Path) -> AbstractContextManager[None]:
        """Keep the state safe while the first worker trains, and make the stop file when it is to stop."""

    def hand_in(self, made: Path) -> None:
        """Keep the trained model safe; called by the first worker."""


class Jobs(Heard):
    """The job that is to be trained, and what the workers report of it; in an actor.

    Args:
        attempts: that a job has, each after the loss of a worker or an error.
        idle: seconds without a job after which the workers are told to end.
    """

    def __init__(self, attempts: int, idle: float) -> None:
        super().__init__()
        self.attempts, self.idle = attempts, idle
        self.job: dict[str, Any] | None = None
        self.number, self.begun, self.error = 0, 0, ""
        self.outcome: dict[str, Any] | None = None
        self.waits, self.over = time.monotonic(), False

    def give(self, job: dict[str, Any]) -> bool:
        """Set the next job; False where the workers were told to end meanwhile."""
        if self.over:
            return False
        self.events, self.latest = [], None
        self.number, self.begun, self.error, self.outcome, self.job = self.number + 1, 0, "", None, job
        return True

    def close(self) -> None:
        self.over = True

    def take(self) -> tuple[int, dict[str, Any]] | None:
        """The job that is to be trained, with its number; None where there is none. Counts the job's attempts."""
        done = self.job is None or self.outcome is not None
        if done:
            self.over = self.over or time.monotonic() - self.waits > self.idle
        if done or self.over:
            return None
        self.begun += 1
        if self.begun > self.attempts:
            text = self.error or f"its workers were lost {self.attempts} times (out of memory, or killed)"
            self.end(self.number, {"failed": text})
            return None
        assert self.job is not None
        return self.number, self.job

    def ended(self) -> bool:
        """Whether the workers are to end."""
        return self.over

    def end(self, number: int, outcome: dict[str, Any]) -> None:
        """A job has ended."""
        if number == self.number:
            self.outcome, self.waits = outcome, time.monotonic()

    def raised(self, number: int, error: str) -> None:
        """A worker has ended by an error."""
        if number == self.number:
            self.error = error

    def look(self, count: int) -> tuple[Any, dict[str, Any] | None]:
        return self.since(count), self.outcome


class WarmWorkers:
    """A run of Ray Train that trains jobs as they come; started by the first job, and again when it has ended.

    Ray has to be initialised. Jobs come one after the other, from one thread.

    Args:
        placement: number of workers and the resources of each.
        storage: absolute path of a folder that all nodes see, or a URL, for what Ray Train keeps of the run.
        max_failures: attempts of a job after the first one; each resumes from its state.
        idle: seconds without a job after which the workers end.
    """

    def __init__(self, placement: Placement, storage: Path | str, *, max_failures: int = 3, idle: float = IDLE) -> None:
        self._placement, self._storage, self._attempts, self._idle = placement, storage, max_failures + 1, idle
        self._jobs: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._trainer: QuietTrainer | None = None
        self._name: str | None = None

    def train(
        self,
        job: TrainingJob,
        out: Path,
        state: Path,
        *,
        name: str,
        provenance: Mapping[str, Any] | None = None,
        elsewhere: Elsewhere | None = None,
        reports: Reports = Reports(),  # noqa: B008 (frozen)
    ) -> bool:
        """Train a job and publish the model as the folder ``out``.

        Args:
            job: what is trained.
            out: folder of the trained model.
            state: file of the training's state; training goes on from it.
            name: the job's name, which Ray Train is told with every epoch.
            provenance: metadata for the model's ``config.json``.
            elsewhere: where the job's files are for workers that do not see its folders; they see them by default.
                The state is then where it says.
            reports: as for ``train_on_ray``.

        Returns:
            False if the job's stop file ended training.

        Raises:
            Diverged, CannotBegin, TrainingFailed: as ``train_on_ray``.
        """
        task = {
            "job": asdict(job),
            "out": str(out),
            "state": str(state),
            "name": name,
            "provenance": dict(provenance or {}),
            "elsewhere": elsewhere,
        }
        if elsewhere is not None:
            elsewhere.give(job)
        for attempt in range(RESTARTS + 1):
            self._hand_over(task)
            outcome = self._wait(reports)
            if outcome is not None:
                return _ended(outcome, elsewhere, out)
            error = self._error
            if attempt == RESTARTS or not (error is None or process_lost(error)) or not alive():
                raise TrainingFailed(str(error)) from error
            free_places()
        raise AssertionError  # the last attempt has returned or raised

    def _hand_over(self, task: Mapping[str, Any]) -> None:
        """Give a job to the workers; start them where there are none, or they are about to end."""
        if self._thread is not None and self._thread.is_alive():
            try:
                if ray.get(self._jobs.give.remote(task)):
                    return
            except RayActorError:
                assert self._trainer is not None
                self._trainer.abort()
            self._thread.join()
        self._forget()
        self._start()
        ray.get(self._jobs.give.remote(task))

    def _wait(self, reports: Reports) -> dict[str, Any] | None:
        """Pass reports on until the job has ended; None where the workers have, or nobody knows of the job any more."""
        assert self._thread is not None
        heard = 0
        while True:
            over = not self._thread.is_alive()
            try:
                found, outcome = ray.get(self._jobs.look.remote(heard))
            except RayActorError as error:
                self._error = self._error or error
                return None
            heard += pass_on(found, reports)
            if outcome is not None:
                return dict(outcome)
            if over:
                return None
            self._thread.join(LOOK)

    def _start(self) -> None:
        own = self._placement
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        jobs = ray.remote(num_cpus=0)(Jobs).options(scheduling_strategy=here)  # type: ignore[call-overload]
        self._jobs, self._error = jobs.remote(self._attempts, self._idle), None
        self._name = f"workers-{uuid.uuid4().hex[:12]}"
        trainer = QuietTrainer(
            _serve,
            train_loop_config={"jobs": self._jobs},
            scaling_config=ScalingConfig(
                num_workers=own.workers,
                use_gpu=own.gpus > 0,
                resources_per_worker={"CPU": own.cpus, **({"GPU": own.gpus} if own.gpus else {})},
            ),
            run_config=RunConfig(
                name=self._name,
                **storage_of(self._storage),
                # ``Jobs`` counts the attempts of each job
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=5),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
            torch_config=TorchConfig(backend=backend_of(own.gpus), timeout_s=300),
        )
        self._trainer = trainer

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # ``train`` judges it
                self._error = error

        self._thread = threading.Thread(target=fit, daemon=True, name="workers")
        self._thread.start()

    def close(self) -> None:
        """End the workers, and remove what Ray Train kept of them."""
        if self._thread is not None and self._thread.is_alive() and alive():
            assert self._trainer is not None
            try:
                ray.get(self._jobs.close.remote(), timeout=END)
                self._thread.join(END)
            except Exception:  # whatever it is: they are to end
                pass
            if self._thread.is_alive():
                self._trainer.abort()
        self._forget()

    def _forget(self) -> None:
        if self._jobs is not None and alive():
            ray.kill(self._jobs)
        if self._name is not None and is_url(self._storage):
            with contextlib.suppress(UserError):  # the run's driver deletes what is left
                Objects(str(self._storage), known=True).delete_folder(self._name)
        elif self._name is not None:
            shutil.rmtree(Path(self._storage, self._name), ignore_errors=True)
        self._jobs = self._thread = self._trainer = self._name = None


_of_this_process: dict[tuple[Placement, Path | str], WarmWorkers] = {}


def workers_for(placement: Placement, storage: Path | str) -> WarmWorkers:
    """Return this process's workers of a shape; those of another one end. Arguments are as for ``WarmWorkers``."""
    key = (placement, storage)
    if key not in _of_this_process:
        close_workers()
        _of_this_process[key] = WarmWorkers(placement, storage)
    return _of_this_process[key]


def close_workers() -> None:
    """End all workers that this process has started."""
    while _of_this_process:
        _of_this_process.popitem()[1].close()


def _ended(outcome: Mapping[str, Any], elsewhere: Elsewhere | None, out: Path) -> bool:
    """``_judged``; what was made elsewhere is brought."""
    try:
        done = _judged(outcome)
    except Diverged:
        if elsewhere is not None:
            elsewhere.forget()
        raise
    if done and elsewhere is not None:
        elsewhere.take(out)
    return done


def _judged(outcome: Mapping[str, Any]) -> bool:
    if "missing" in outcome:
        raise CannotBegin(outcome["missing"])
    if "diverged" in outcome:
        raise Diverged(outcome["diverged"])
    if "failed" in outcome:
        raise TrainingFailed(outcome["failed"])
    return "stopped" not in outcome


def _serve(config: dict[str, Any]) -> None:
    """Train jobs as one of the workers until no more come; all of them take the same ones in the same order."""
    jobs, first = config["jobs"], ray.train.get_context().get_world_rank() == 0
    while True:
        found = _next(jobs, first)
        if found is None:
            return
        number, task = found
        try:
            outcome = _train(task, jobs)
        except Exception:
            jobs.raised.remote(number, traceback.format_exc())
            raise  # Ray Train starts all workers anew
        if first:
            ray.get(jobs.end.remote(number, outcome))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _next(jobs: Any, first: bool) -> tuple[int, dict[str, Any]] | None:
    """Wait for the next job, or for the end, which is None; the first worker asks, so that all take the same."""
    found = None
    while first and found is None and not ray.get(jobs.ended.remote()):
        found = ray.get(jobs.take.remote())
        if found is None:
            time.sleep(ASK)
    if ray.train.get_context().get_world_size() > 1:
        shared = [found]
        torch.distributed.broadcast_object_list(shared, src=0)
        (found,) = shared
    return found


def _train(task: Mapping[str, Any], jobs: Any) -> dict[str, Any]:
    """Train one job as one of the workers; the first one reports, and saves the models."""
    job, elsewhere = TrainingJob(**task["job"]), task["elsewhere"]
    state, out, bring = Path(task["state"]), Path(task["out"]), None
    first, carried = ray.train.get_context().get_world_rank() == 0, contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        if elsewhere is not None:
            folder = stack.enter_context(scratch_folder())
            state, out, job = folder / STATE, folder / MADE, elsewhere.seen_from(job, folder)
            bring = partial(elsewhere.bring, job, folder)
            carried = elsewhere.carrying(job, folder) if first else carried
        loaded, missing = load_together(job, jobs, bring)
        if loaded is None:
            return {"missing": missing}
        try:
            with carried:
                models, outcome = train_together(
                    job, loaded, jobs, state, lambda epoch: ray.train.report({"job": task["name"], **asdict(epoch)})
                )
            if outcome is not None:
                return outcome
            if models is None:
                return {"stopped": True}
            if first:
                with publish_folder(out) as target:
                    for place, (model, figures) in models.items():
                        save(model.cpu(), target / place, {**task["provenance"], **figures})
                if elsewhere is not None:
                    elsewhere.hand_in(out)
                state.unlink(missing_ok=True)
        except CannotBegin as error:
            return {"missing": str(error)}
    return {"done": True}
