"""Train with a method that decides meanwhile (a ``TrainedMethod``), and cut the source as it decided."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunesweep.models import Arch, Cut, UserError, arch_of, cost, cut, cut_arch
from prunesweep.models.precision import as_stored, keep_dtype
from prunesweep.models.recalibrate import recalibrate
from prunesweep.pruners import ScoredMethod, TrainedMethod, get_method, meets, method_names, spent
from prunesweep.pruners.method import Decided

from ..compatibility import check_fits
from ..data import Data
from ..evaluation import EVAL_BATCH, evaluate
from ..loop import fit
from ..recipe import Recipe
from ..second_stage import DECISION
from ..settling import check_settles
from ..trainer import batches_of
from ..world import World

__all__ = ["Made", "PruneJob", "check_decides", "decide_while_training", "prune_while_training"]


@dataclass(frozen=True)
class PruneJob:
    """A method by name with its settings, and the images that new BatchNorms are estimated on; JSON-ready."""

    method: str
    settings: Mapping[str, Any]
    images: int = 1024
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Made:
    """A model cut to ``budget``, a share of the source's MACs, with its validation accuracy in percent.

    ``metadata`` goes into its provenance. It includes the decision if the method's second stage needs it.
    """

    budget: float
    cut: Cut
    model: nn.Module
    top1: float
    metadata: Mapping[str, Any]


def prune_while_training(source: Any, data: Data, recipe: Recipe, job: PruneJob, **options: Any) -> list[Made] | None:
    """Train a copy of ``source`` while a method decides, then cut it.

    In a process group, every worker calls this with the same source, data, recipe and job, and gets the same models.

    Args:
        source: a model on its device; also the teacher of the recipe's distillation.
        data: data set to train and evaluate on.
        recipe: the training during which the method decides.
        job: the method and its settings.
        options: further arguments of ``fit``.

    Returns:
        A model for each budget; None if ``should_stop`` ended training.

    Raises:
        UserError: a setting does not fit, the budget cannot be met, or the search collapsed or diverged.
    """
    method, arch = get_method(job.method, TrainedMethod), arch_of(source)
    settings = method.settings().model_validate(job.settings)
    decided = decide_while_training(source, data, recipe, job.method, settings, **options)
    if decided is None:
        return None
    world, device = World.current(), next(source.parameters()).device
    found = []
    for one in decided:
        small = one.model
        if small is None:
            small = cut(source, one.cut)
            recalibrate(small, data.calibration(job.images, job.batch_size, job.seed))
        keep_dtype(small, source)
        as_stored(small)
        small = small.to(device)
        top1 = evaluate(small, data.val_loader(EVAL_BATCH, world), world)["top1"]
        metadata: dict[str, Any] = {"budget": one.budget, "spent": _spent(job.method, arch, one), "top1": top1}
        if method.second_stage is not None and method.second_stage.needs_decision:
            metadata[DECISION] = one.cut.to_dict()
        found.append(Made(one.budget, one.cut, small, top1, metadata))
    return found


def decide_while_training(
    source: Any, data: Data, recipe: Recipe, method: str, settings: Any, **options: Any
) -> list[Decided] | None:
    """Train a copy of ``source`` while a method decides.

    Args:
        source: a model on its device; also the teacher of the recipe's distillation.
        data: data set to train on.
        recipe: the training during which the method decides.
        method: name of a ``TrainedMethod``.
        settings: of the method.
        options: further arguments of ``fit``.

    Returns:
        The decisions, one or more; None if ``should_stop`` ended training.

    Raises:
        UserError: no budget was reached, or the search collapsed or diverged.
    """
    entry, arch = get_method(method, TrainedMethod), arch_of(source)
    hook, model = entry.hook(settings, arch), copy.deepcopy(source)
    if not fit(model, data, recipe, teacher=source, hook=hook, **options):
        return None
    decided = entry.decided(settings, arch, hook.finish())
    if not decided:
        raise UserError(
            f"method {method!r}: no budget was reached in {recipe.epochs} epochs; train longer or raise the budget"
        )
    return decided


def check_decides(source: Any, data: Data, recipe: Recipe, method: str, settings: Any) -> None:
    """Check that a method can decide while a copy of ``source`` trains.

    Args:
        source: the model.
        data: data set to train on.
        recipe: the training during which the method decides.
        method: name of a ``TrainedMethod``.
        settings: of the method.

    Raises:
        UserError: a setting, the source, the data or the recipe do not fit together.
    """
    arch = arch_of(source)
    hook = get_method(method, TrainedMethod).hook(settings, arch)
    hook.wrap(copy.deepcopy(source))
    check_settles(recipe, source=True, method=True)
    check_fits(arch, data)
    others = f"take a method that scores: {', '.join(method_names(ScoredMethod))}"
    if arch.headless:
        raise UserError(
            f"method {method!r} decides while it trains on labels, {arch.source} has no head: give it a classifier, or "
            f"{others}"
        )
    if not data.info.labelled:
        raise UserError(
            f"method {method!r} decides while it trains on labels, {data.info.name} has none: give data with labels, "
            f"or {others}"
        )
    hook.check_length(recipe.epochs, batches_of(data, recipe, World()).updates)


def _spent(method: str, arch: Arch, one: Decided) -> dict[str, Any]:
    """Say what a decision was asked to cost and what it costs, and name what is in the way if that is too little."""
    whole, found = cost(arch).macs, cost(cut_arch(arch, one.cut)).macs
    missed = "" if meets(found, one.budget * whole) else one.hindrance or f"{method} decides in coarser steps here"
    return spent("macs", one.budget * whole, found, whole, missed)
