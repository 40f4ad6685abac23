"""Describe one training as data, and carry it out as one of its processes: train, measure, return models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from prunesweep.models import UserError, load, resize
from prunesweep.models.precision import as_stored, to_float32
from prunesweep.pruners.hook import Hook

from ..closest import Kept
from ..data import Data, open_data
from ..evaluation import evaluate_on
from ..loop import Epoch, fit
from ..metrics import EvalMetrics
from ..named_code import allow_modules, allowed_modules
from ..recipe import Recipe
from ..second_stage import SecondStageJob
from ..settling import settled
from ..world import World
from .prune_loop import PruneJob, prune_while_training

__all__ = [
    "STATE",
    "CannotBegin",
    "Inputs",
    "LoadedJob",
    "Reports",
    "TrainedModels",
    "TrainingJob",
    "load_job",
    "load_sized",
    "train_models",
]

STATE = "state.safetensors"  # file name of the state of a training that is not done

# by folder below the result's ("" is the result itself): a model, and further entries of its ``config.json``
TrainedModels = dict[str, tuple[nn.Module, dict[str, Any]]]


class CannotBegin(UserError):
    """A process of a job misses what the job is about, its models or its data: no other job of the kind could begin."""


@dataclass(frozen=True)
class TrainingJob:
    """One training, JSON-ready: folders that every worker can read, and the arguments of ``fit``.

    Args:
        model: folder of a saved model.
        data: name of the data set, as for ``open_data``.
        recipe: a ``Recipe`` as JSON.
        teacher: folder of the model that distillation calls the source, if any.
        teacher_cache: as for ``fit``.
        seed: as for ``fit``.
        data_options: keyword arguments of ``open_data``, so that workers open the same data.
        modules: those whose functions ``data`` may name; by default those of the process that makes the job.
        stop_file: path; training ends after an epoch once this file exists.
        prune: a ``PruneJob`` as JSON, for a method that decides while training; the published models are then cut.
        second_stage: a ``SecondStageJob`` as JSON, for finetuning in a pruning method's own way.
        halvings: as for ``fit``; of a job without ``prune``.
        img_size: rows and columns of the images, where model and teacher are trained at another size than they have.
    """

    model: str
    data: str
    recipe: Mapping[str, Any]
    teacher: str | None = None
    teacher_cache: str | None = None
    seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=dict)
    modules: Sequence[str] = field(default_factory=allowed_modules)
    stop_file: str | None = None
    prune: Mapping[str, Any] | None = None
    second_stage: Mapping[str, Any] | None = None
    halvings: int = 0
    img_size: Sequence[int] | None = None


class Inputs(Protocol):
    """Where a job's files are for workers that do not see the folders of who hands it over. It can be sent."""

    def seen_from(self, job: TrainingJob, folder: Path) -> TrainingJob:
        """Return the job with the paths that a worker finds its files at, who has a folder for it."""

    def bring(self, job: TrainingJob, folder: Path) -> None:
        """Bring the files of a job that ``seen_from`` gave; called by every worker before training.

        Raises:
            CannotBegin: they cannot be had, which is no fault of the job's.
        """


@dataclass(frozen=True, eq=False)
class LoadedJob:
    """The models of a job on their device, and its opened data."""

    model: nn.Module
    teacher: nn.Module | None
    data: Data


@dataclass(frozen=True)
class Reports:
    """Functions that are called with the progress of a training; their arguments are as for ``fit``."""

    on_step: Callable[[int, int, float], None] | None = None
    on_epoch: Callable[[Epoch], None] | None = None
    on_note: Callable[[str], None] | None = None


def load_sized(path: str | Path, img_size: Sequence[int] | None) -> Any:
    """Load a saved model, for images of a size.

    Args:
        path: its folder.
        img_size: rows and columns; the model's own by default.

    Raises:
        UserError: as for ``load`` and ``resize``.
    """
    model = load(path)
    if img_size is not None:
        rows, columns = img_size
        resize(model, (rows, columns))
    return model


def load_job(job: TrainingJob, device: torch.device | str, data: Data | None = None) -> LoadedJob:
    """Load a job's models, for work in float32, and open its data.

    Args:
        job: the job.
        device: where the models go.
        data: the job's data, if it is open already.
    """
    allow_modules(job.modules)
    model, teacher = (None if path is None else load_sized(path, job.img_size) for path in (job.model, job.teacher))
    model, teacher = (None if own is None else to_float32(own).to(device) for own in (model, teacher))
    assert model is not None
    data = data or open_data(job.data, model.pretrained_cfg, **job.data_options)
    return LoadedJob(model, teacher, data)


def train_models(job: TrainingJob, loaded: LoadedJob, *, state: Path, reports: Reports) -> TrainedModels | None:
    """Carry out a job as one of its processes.

    In a process group every worker calls this with the same job, and gets the same models.

    Args:
        job: what is trained.
        loaded: the job's models and data; ``loaded.model`` is trained in place, unless a method prunes it.
        state: file of the training's state, see ``fit``.
        reports: functions called with the progress, in this process.

    Returns:
        The models by their folder below the result's, with their figures; None if the stop file ended training.

    Raises:
        UserError: as for ``fit`` and ``prune_while_training``.
    """
    latest: EvalMetrics | None = None

    def on_epoch(epoch: Epoch) -> None:
        nonlocal latest
        latest = EvalMetrics.of({**asdict(epoch), "loss": epoch.val_loss})
        if reports.on_epoch:
            reports.on_epoch(epoch)

    kept: Kept | None = None

    def on_kept(choice: Kept) -> None:
        nonlocal kept
        kept = choice
        if reports.on_note:
            reports.on_note(str(choice))

    recipe = Recipe.model_validate(job.recipe)
    options: dict[str, Any] = {
        "seed": job.seed,
        "state": state,
        "teacher_cache": None if job.teacher_cache is None else Path(job.teacher_cache),
        "on_step": reports.on_step,
        "on_epoch": on_epoch,
        "on_note": reports.on_note,
        "should_stop": None if job.stop_file is None else Path(job.stop_file).exists,
    }
    if job.prune is not None:
        made = prune_while_training(loaded.model, loaded.data, recipe, PruneJob(**job.prune), **options)
        if made is None:
            return None
        several = len(made) > 1
        return {f"{m.budget:.4g}" if several else "": (m.model, dict(m.metadata)) for m in made}
    stage = None if job.second_stage is None else SecondStageJob(**job.second_stage)
    hook = Hook() if stage is None else stage.hook(job.model, job.teacher)
    by_share, recipe = bool(recipe.lr_by_share), settled(recipe, loaded.data, loaded.model, loaded.teacher)
    if not fit(
        loaded.model,
        loaded.data,
        recipe,
        teacher=loaded.teacher,
        hook=hook,
        on_kept=on_kept,
        halvings=job.halvings,
        **options,
    ):
        return None
    hook.finish()
    rounded, earlier = as_stored(loaded.model), kept is not None and kept.epoch < recipe.epochs
    if latest is None or stage is not None or rounded or earlier:  # what was measured last is another model
        world = World.current()
        latest = EvalMetrics.of(evaluate_on(loaded.model, loaded.data, world, source=loaded.teacher))
    rate = {"lr": recipe.lr} if by_share else {}
    choice = {"kept": kept.as_dict()} if kept else {}
    return {"": (loaded.model, {**latest.as_dict(), **rate, **choice})}
