"""The one training loop.

Everything random in an epoch follows from (seed, epoch), so a run that was cut off and resumed from its last epoch is
the run that was not. timm brings the task (loss, distillation), the optimizer and the schedule.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from models import UserError, blocks_of
from pruners.hook import Hook, TrainingHook

from .checkpoint import load_state, save_state
from .data import Data
from .evaluate import EVAL_BATCH, evaluate
from .recipe import Recipe

__all__ = ["Epoch", "fit", "seeded"]


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave: mean training ``loss``, validation ``top1`` (percent), ``images_per_s`` of training."""

    epoch: int  # from 1
    epochs: int
    loss: float
    top1: float
    lr: float
    images_per_s: float


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's global generators start from ``seed`` inside, and go on as before afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    hook: TrainingHook[Any] | None = None,
    seed: int = 0,
    state: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> bool:
    """Train ``model`` in place; True when all is done, False when ``should_stop`` ended it after an epoch.

    Args:
        model: a classifier with timm's ``pretrained_cfg``; ends in eval mode.
        data: what to train and evaluate on.
        recipe: epochs, optimizer and losses.
        teacher: the model to distil from where ``recipe.distill_weight`` is not 0; moved to the model's device.
        hook: a method that prunes while the model trains; new, or as it was for the run that ``state`` is of. May end
            the training early. Its ``finish`` is the caller's to call.
        seed: together with the epoch's number fixes order, augmentation and stochastic depth.
        state: file that keeps the state after every epoch and from which an unfinished run goes on.
        on_step: called with (steps done, steps in all, loss).
        on_epoch: called after every epoch's evaluation.
        should_stop: asked after every epoch.

    Raises:
        UserError: ``state`` is that of a run with another kind of hook.
    """
    _set_drop_path(model, recipe.drop_path)
    hook = Hook() if hook is None else hook
    hook.wrap(model)
    task = _task(model, teacher, recipe).to(next(model.parameters()).device)
    optimizer = _optimizer(model, hook, recipe)
    order = torch.Generator()
    loader = data.train_loader(recipe.batch_size, order)
    scheduler = _scheduler(optimizer, recipe, len(loader))
    done = _resume(state, model, optimizer, hook)
    finished = done == recipe.epochs or hook.done
    for epoch in range(recipe.epochs if finished else done, recipe.epochs):
        with seeded(_mix(seed, epoch)):
            order.manual_seed(_mix(seed, epoch))
            loss, rate = _train_epoch(task, model, hook, loader, optimizer, scheduler, recipe, epoch, on_step)
        if state is not None:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "hook": hook.state_dict()}
            save_state(state, {"epoch": epoch + 1, **parts})
        if on_epoch:
            top1 = evaluate(model, data.val_loader(EVAL_BATCH))["top1"]
            on_epoch(Epoch(epoch + 1, recipe.epochs, loss, top1, optimizer.param_groups[0]["lr"], rate))
        finished = epoch + 1 == recipe.epochs or hook.done
        if finished or (should_stop is not None and should_stop()):
            break
    model.eval()
    return finished


def _mix(seed: int, epoch: int) -> int:
    """A seed per epoch; neighbouring epochs of neighbouring seeds share none."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth that rises linearly from 0 at the first block to ``rate`` at the last one."""
    blocks = blocks_of(model)
    for block, p in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):  # a block may lack either half
                setattr(block, name, DropPath(p) if p > 0 else nn.Identity())


def _task(model: nn.Module, teacher: nn.Module | None, recipe: Recipe) -> TrainingTask:
    criterion = {"smoothing": recipe.label_smoothing}
    if not recipe.distill_weight:
        return ClassificationTask(model, criterion_kwargs=criterion, verbose=False)
    if teacher is None:
        raise ValueError("recipe.distill_weight is set, but there is no teacher")
    return LogitDistillationTask(
        model,
        teacher,
        criterion_kwargs=criterion,
        distill_loss_weight=recipe.distill_weight,
        task_loss_weight=1.0,
        temperature=recipe.distill_temperature,
        verbose=False,
    )


def _optimizer(model: nn.Module, hook: TrainingHook[Any], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the model's parameters, and the hook's, whose groups have settings of their own."""
    optimizer = create_optimizer_v2(model, "adamw", lr=recipe.lr, weight_decay=recipe.weight_decay)
    groups = hook.parameter_groups()
    own = {id(p) for group in groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
    for group in groups:
        optimizer.add_param_group(group)
    return optimizer


def _scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Any:
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=max(recipe.epochs, 1),
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.lr / 100,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


def _resume(state: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, hook: TrainingHook[Any]) -> int:
    """Load the last whole epoch; the number of epochs done."""
    found = load_state(state) if state is not None else None
    if found is None:
        return 0
    if found.get("hook", {}).keys() != hook.state_dict().keys():
        raise UserError(f"{state}: this run was started with another method of pruning; delete it, or use that method")
    model.load_state_dict(found["model"], strict=True)
    optimizer.load_state_dict(found["optimizer"])
    hook.load_state_dict(found.get("hook", {}))
    return int(found["epoch"])


def _train_epoch(
    task: TrainingTask,
    model: nn.Module,
    hook: TrainingHook[Any],
    loader: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    recipe: Recipe,
    epoch: int,
    on_step: Callable[[int, int, float], None] | None,
) -> tuple[float, float]:
    """Mean loss, and images per second."""
    task.train()
    hook.start_epoch()
    device = next(model.parameters()).device
    total, images, start = 0.0, 0, time.perf_counter()
    for index, (x, y) in enumerate(loader):
        step = epoch * len(loader) + index
        scheduler.step_update(step)
        loss = hook.loss(task(x.to(device), y.to(device)))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        hook.after_backward()
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        hook.after_step()
        total, images = total + loss.item() * len(x), images + len(x)
        if on_step:
            on_step(step + 1, recipe.epochs * len(loader), loss.item())
        if hook.done:
            break
    return total / images, images / (time.perf_counter() - start)
