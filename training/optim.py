"""Make the optimizer and the schedule of a recipe with timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from prunesweep.models import UserError
from prunesweep.models.errors import nearest
from prunesweep.pruners.hook import TrainingHook

from .recipe import Recipe

__all__ = ["make_optimizer", "make_scheduler"]


def make_optimizer(model: nn.Module, hook: TrainingHook[Any], recipe: Recipe) -> torch.optim.Optimizer:
    """Make the recipe's optimizer over the parameters of the model and of the hook.

    Args:
        model: the model that is trained.
        hook: the pruning method; its parameter groups keep their own settings.
        recipe: gives the optimizer, learning rate, weight decay and layer decay.

    Raises:
        UserError: timm has no such optimizer.
    """
    if recipe.optimizer not in list_optimizers():
        hint = nearest(recipe.optimizer, list_optimizers())
        raise UserError(f"recipe: optimizer = {recipe.optimizer!r}: timm has none of that name. {hint}".strip())
    optimizer = create_optimizer_v2(
        model,
        recipe.optimizer,
        lr=recipe.peak_lr,
        weight_decay=recipe.weight_decay,
        filter_bias_and_bn=not recipe.decay_all,
        layer_decay=recipe.layer_decay,
    )
    groups = hook.parameter_groups()
    own = {id(p) for group in groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
    for group in groups:
        optimizer.add_param_group(group)
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, updates: int) -> Any:
    """Make a schedule per update: linear warm-up, then cosine decay or a constant rate.

    A constant rate is a decay by the factor 1, so that groups with rates of their own keep them.

    Args:
        optimizer: the optimizer whose rates are scheduled.
        recipe: gives schedule, epochs and warm-up.
        updates: number of updates in an epoch.

    Returns:
        timm's scheduler.
    """
    warmup: float = recipe.warmup_epochs
    if recipe.warmup_updates:
        warmup = min(recipe.warmup_updates, recipe.epochs * updates // 4) / updates
    start = recipe.peak_lr / 100 if recipe.warmup_lr is None else recipe.warmup_lr
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "step" if recipe.schedule == "constant" else "cosine",
        decay_rate=1.0,
        num_epochs=max(recipe.epochs, 1),
        warmup_epochs=warmup,
        warmup_lr=start,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return scheduler
