"""Run a training job: in this process, as a worker that torchrun started, or on Ray Train."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from prunesweep.models import UserError, save
from prunesweep.models.io.files import publish, publish_folder

from ..container import check_shared_memory
from ..data import Data
from ..loop import Epoch
from ..recipe import Recipe
from ..trainer import batches_of
from ..world import World
from .metrics_log import MetricsLog
from .placement import Placement
from .training_job import STATE, Inputs, LoadedJob, Reports, TrainedModels, TrainingJob, load_job, train_models

if TYPE_CHECKING:
    from .warm_workers import Elsewhere

__all__ = ["release_workers", "run_job"]

RAY, MADE = "ray", "made"  # folders of checkpoints and of the result in the work folder


def run_job(
    job: TrainingJob,
    out: Path,
    work: Path,
    *,
    data: Data,
    placement: Placement,
    log: MetricsLog,
    provenance: Mapping[str, Any],
    loaded: LoadedJob | None = None,
    name: str | None = None,
    keep_workers: Path | str | None = None,
    elsewhere: Elsewhere | None = None,
    inputs: Inputs | None = None,
    reports: Reports = Reports(),  # noqa: B008 (frozen)
) -> bool:
    """Train a job and publish the result, here or on Ray Train; an interrupted job is resumed.

    A method with several budgets publishes several models, in folders of ``out`` named by their budgets.

    Args:
        job: what is trained. On Ray its folders are paths that every node can read.
        out: folder of the result.
        work: folder of the training's state, until training is done.
        data: the opened data set of the job.
        placement: where it is trained.
        log: records every epoch.
        provenance: metadata for the result's ``config.json``.
        loaded: the job's models, if they are in memory already; only used without Ray.
        name: the run's name under Ray's storage, by which it is found again; by default that of ``work`` without a
            leading dot.
        keep_workers: folder or URL for Ray Train, by which its workers stay for this process's next job
            (``WarmWorkers``); every node sees it and ``work``, where the training's state is then.
        elsewhere: with ``keep_workers``, where the job's files and its state are for nodes that do not see ``work``.
        inputs: without ``keep_workers``, where the job's folders are for nodes that do not see them; ``placement`` has
            a URL for checkpoints then.
        reports: functions called with the progress, in this process.

    Returns:
        False if the job's stop file ended training.

    Raises:
        UserError: a batch cannot be shared among the workers, training failed or diverged, or Ray cannot hold the
            workers.
    """

    def on_epoch(epoch: Epoch) -> None:
        log.epoch(epoch)
        if reports.on_epoch:
            reports.on_epoch(epoch)

    logged = replace(reports, on_epoch=on_epoch)
    if placement.here:
        return _run_here(job, out, work, data, provenance, loaded, logged)
    if keep_workers is not None:
        place = (name or work.name, keep_workers, elsewhere)
        return _run_on_kept(job, out, work, data, placement, provenance, *place, logged)
    own = name or work.name.removeprefix(".")
    return _run_on_ray(job, out, work, data, placement, provenance, own, inputs, logged)


def _run_here(
    job: TrainingJob,
    out: Path,
    work: Path,
    data: Data,
    provenance: Mapping[str, Any],
    loaded: LoadedJob | None,
    reports: Reports,
) -> bool:
    """Train in this process, which may be one of torchrun's; the first one reports and saves."""
    check_shared_memory()
    with _process_group() as (world, device):
        loaded = loaded or load_job(job, device, data)
        state = work / STATE
        if world.first:
            work.mkdir(exist_ok=True)
        models = train_models(job, loaded, state=state, reports=reports if world.first else Reports())
        if models is None:
            return False
        if world.first:
            _save(models, out, provenance)
            state.unlink(missing_ok=True)
    return True


def _save(models: TrainedModels, out: Path, provenance: Mapping[str, Any]) -> None:
    """Save the models of a job in one step: a folder of several is never there in part."""
    with nullcontext(out) if "" in models else publish_folder(out) as folder:
        for where, (model, figures) in models.items():
            save(model.cpu(), folder / where, {**provenance, **figures})


@contextmanager
def _process_group() -> Iterator[tuple[World, torch.device]]:
    """Join torchrun's process group where it started this process; yield this worker and its device."""
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local}" if gpu else "cpu")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World(), device
        return
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield World.current(), device
    finally:
        dist.destroy_process_group()


def _run_on_kept(
    job: TrainingJob,
    out: Path,
    work: Path,
    data: Data,
    placement: Placement,
    provenance: Mapping[str, Any],
    name: str,
    storage: Path | str,
    elsewhere: Elsewhere | None,
    reports: Reports,
) -> bool:
    """Train on workers that stay for the next job; this process has joined a Ray."""
    from .ray_workers import TrainingFailed
    from .warm_workers import workers_for

    batches_of(data, Recipe.model_validate(job.recipe), World(0, placement.workers))
    try:
        kept = workers_for(placement, storage)
        told: dict[str, Any] = {"provenance": provenance, "elsewhere": elsewhere, "reports": reports}
        return kept.train(job, out, work / STATE, name=name, **told)
    except TrainingFailed as error:
        raise UserError(f"training failed: {error}") from error


def release_workers() -> None:
    """End the workers that stay for this process's next job, if there are any."""
    module = sys.modules.get(f"{__package__}.warm_workers")  # which takes seconds to import
    if module is not None:
        module.close_workers()


def _run_on_ray(
    job: TrainingJob,
    out: Path,
    work: Path,
    data: Data,
    placement: Placement,
    provenance: Mapping[str, Any],
    name: str,
    inputs: Inputs | None,
    reports: Reports,
) -> bool:
    """Train on Ray Train's workers; delete its checkpoints in ``work`` once the result is published.

    That is done when Ray has ended, which takes seconds: whoever has the result has all, and can delete the rest.
    """
    from .ray_session import connected
    from .ray_workers import TrainingFailed, train_on_ray

    recipe = Recipe.model_validate(job.recipe)
    for number in range(placement.min_workers or placement.workers, placement.workers + 1):
        batches_of(data, recipe, World(0, number))
    elastic = placement.min_workers is not None and placement.address is not None
    needed = placement.min_workers if elastic and placement.min_workers else placement.workers
    storage = placement.storage or str(work / RAY)
    with connected(placement.address, cpus=needed * placement.cpus, gpus=needed * placement.gpus):
        try:
            made = work / MADE
            told: dict[str, Any] = {"provenance": provenance, "inputs": inputs, "reports": reports}
            done = train_on_ray(job, placement, made, storage=storage, name=name, **told)
        except TrainingFailed as error:
            raise UserError(f"training failed: {error}") from error
    if done:
        publish(made, out)
    if done and placement.storage is None:
        shutil.rmtree(work / RAY, ignore_errors=True)
    return done
