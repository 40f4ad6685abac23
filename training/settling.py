"""Settle what a recipe leaves open until model, source and data are known: the learning rate, the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from prunesweep.models import Arch, UserError, arch_of, cost

from .data import Data
from .recipe import Recipe

__all__ = ["check_settles", "rate_at", "settled"]


def rate_at(points: Sequence[tuple[float, float]], share: float) -> float:
    """Return the learning rate for a model that has ``share`` of its source's MACs.

    Args:
        points: (share, rate) pairs. Between two of them the rate is a power of the share, log-log interpolation; beyond
            them it is that of the nearest one.
        share: share of the source's MACs, above 0.
    """
    (low, rate), *others = sorted(points)
    if share <= low:
        return rate
    for high, to in others:
        if share <= high:
            part = math.log(share / low) / math.log(high / low)
            return rate * (to / rate) ** part
        low, rate = high, to
    return rate


def settled(recipe: Recipe, data: Data, model: nn.Module | Arch, source: nn.Module | Arch | None) -> Recipe:
    """Return a recipe with nothing left open; one that leaves nothing open is returned as it is.

    Args:
        recipe: its ``lr_by_share`` becomes ``lr``. If it ``adapts``, ``loss_weight`` becomes 0 where data have no
            labels or the model has no head, and the terms ``soft`` of such a model become ``feature``.
        data: the data set.
        model: the model to train, or its record.
        source: the model that it was made from, its teacher, or its record; None if it is not known.

    Raises:
        UserError: the recipe needs the source.
    """
    check_settles(recipe, source=source is not None)
    changes: dict[str, Any] = {}
    if recipe.lr_by_share and source is not None:
        share = cost(_record(model)).macs / cost(_record(source)).macs
        changes |= {"lr": rate_at(recipe.lr_by_share, share), "lr_by_share": ()}
    if recipe.adapts and (not data.info.labelled or _record(model).headless):
        changes["loss_weight"] = 0.0
    if recipe.adapts and _record(model).headless:
        of_features = {"kind": "feature", "cache_teacher": False}  # what is kept of a teacher are its answers
        changes["distill"] = tuple(
            term.model_copy(update=of_features) if term.kind == "soft" else term for term in recipe.distill
        )
    return recipe.model_copy(update=changes) if changes else recipe


def check_settles(recipe: Recipe, *, source: bool, method: bool = False) -> None:
    """Check that what a recipe leaves open will follow from a training's parts.

    Args:
        recipe: the recipe.
        source: whether the training knows the source of its model.
        method: whether a method acts while the model trains.

    Raises:
        UserError: it needs the source, or its last epoch.
    """
    if method and recipe.keep == "best":
        raise UserError(
            "recipe: keep = 'best': compares the models of all epochs with the source, but a method that acts while "
            "the model trains has its result in the last one: set keep = 'last'"
        )
    if source:
        return
    if recipe.lr_by_share:
        raise UserError(
            "recipe: lr_by_share: the learning rate follows from the share of the source's MACs that is left, which is "
            "not known here: give the model that this one was made from as its teacher (--teacher), or take a recipe "
            "with an lr"
        )
    if recipe.keep == "best":
        raise UserError(
            "recipe: keep = 'best': is the model with the lowest KL divergence from its source, which is not known "
            "here: give the model that this one was made from as its teacher (--teacher), or set keep = 'last'"
        )


def _record(model: nn.Module | Arch) -> Arch:
    return model if isinstance(model, Arch) else arch_of(model)
