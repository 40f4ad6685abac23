"""The one training loop: in one process, and as every worker of a process group (Ray Train's or torchrun's).

Everything random in an epoch follows from (seed, epoch, rank), so a run that was cut off and resumed from its last
epoch is the run that was not; batches follow from (seed, epoch) alone, so more workers see the same images. timm brings
the task (loss), averaging of weights, the optimizer and the schedule.
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
from timm.data import Mixup
from timm.layers import DropPath
from timm.task import TrainingTask
from torch import nn

from models import UserError, blocks_of
from pruners.hook import Hook, TrainingHook

from .batches import EpochBatches
from .checkpoint import load_state, save_state
from .data import Data
from .evaluate import EVAL_BATCH, evaluate
from .optim import make_optimizer, make_scheduler
from .recipe import Recipe
from .task import make_task
from .world import World

__all__ = ["Diverged", "Epoch", "fit", "seeded"]

CHECK_EVERY = 20  # updates between two looks at the loss on a GPU, where looking waits for it


class Diverged(UserError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave: mean training ``loss``, validation accuracy in percent, ``images_per_s`` of training."""

    epoch: int  # from 1
    epochs: int
    loss: float
    top1: float
    top5: float
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

    In a process group, every worker calls this with the same model, data and recipe.

    Args:
        model: a classifier with timm's ``pretrained_cfg``; ends in eval mode.
        data: what to train and evaluate on.
        recipe: epochs, optimizer, augmentation and losses.
        teacher: what the recipe's distillation terms call the source; moved to the model's device.
        hook: a method that prunes while the model trains; new, or as it was for the run that ``state`` is of. May end
            the training early. Its ``finish`` is the caller's to call.
        seed: together with the epoch's number fixes order, augmentation and stochastic depth.
        state: file that keeps the state after every epoch and from which an unfinished run goes on; the first worker
            writes it, all of them read it.
        on_step: called with (updates done, updates in all, loss of this worker).
        on_epoch: called after every epoch's evaluation, on every worker, with the same numbers.
        should_stop: asked after every epoch; one worker's yes is enough.

    Raises:
        UserError: the batch does not fit the data or the workers, a teacher is missing, or ``state`` is that of a run
            with another kind of hook.
        Diverged: the loss is not finite; ``state`` has the last epoch before.
    """
    hook = Hook() if hook is None else hook
    trainer = _Trainer(model, data, recipe, hook, teacher, World.current(), on_step)
    done = trainer.resume(state)
    finished = done == recipe.epochs or hook.done
    for epoch in range(recipe.epochs if finished else done, recipe.epochs):
        with seeded(_mix(seed, epoch, trainer.world.rank)):
            trainer.batches.start(_mix(seed, epoch, 0))
            loss, rate = trainer.train_epoch(epoch)
        if state is not None and trainer.world.first:
            save_state(state, trainer.state(epoch + 1))
        if on_epoch:
            found = evaluate(trainer.kept_model(), data.val_loader(EVAL_BATCH, trainer.world), trainer.world)
            lr = trainer.optimizer.param_groups[0]["lr"]
            on_epoch(Epoch(epoch + 1, recipe.epochs, loss, found["top1"], found["top5"], lr, rate))
        finished = epoch + 1 == recipe.epochs or hook.done
        stop = should_stop is not None and should_stop()
        if finished or trainer.world.total(torch.tensor(float(stop), device=trainer.device)) > 0:
            break
    if finished:
        trainer.keep_average()
    model.eval()
    return finished


def _mix(seed: int, epoch: int, rank: int) -> int:
    """A seed per epoch and worker; neighbouring ones share none."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Trainer:
    """What one worker needs from the first update to the last."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        hook: TrainingHook[Any],
        teacher: nn.Module | None,
        world: World,
        on_step: Callable[[int, int, float], None] | None,
    ) -> None:
        self.model, self.recipe, self.hook, self.world, self.on_step = model, recipe, hook, world, on_step
        self.device = next(model.parameters()).device
        self.batches = _batches(data, recipe, world)
        self.loader = data.train_loader(self.batches, recipe)
        _set_drop_path(model, recipe.drop_path)
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        hook.wrap(model)
        self.task: TrainingTask = make_task(model, recipe, teacher).to(self.device)
        if recipe.ema is not None:
            self.task.setup_ema(decay=recipe.ema)
        self.optimizer = make_optimizer(model, hook, recipe)
        if recipe.compile:
            self.task.compile()
        if world.size > 1:
            on_gpu = self.device.type == "cuda"
            self.task.prepare_distributed(device_ids=[self.device.index] if on_gpu else None)
        self.scheduler = make_scheduler(self.optimizer, recipe, self.batches.updates)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.mixup = _mixup(recipe, data.info.num_classes)

    def train_epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss, and images per second, over all workers."""
        self.task.train()
        self.hook.start_epoch()
        recipe, updates = self.recipe, self.batches.updates
        total, images, start = torch.zeros((), dtype=torch.float64, device=self.device), 0, time.perf_counter()
        for index, (x, y) in enumerate(self.loader):
            part = index % recipe.accumulate
            update = epoch * updates + index // recipe.accumulate
            if part == 0:
                self.scheduler.step_update(update)
                self.optimizer.zero_grad(set_to_none=True)
            last = part == recipe.accumulate - 1
            with contextlib.nullcontext() if last else self.task.no_sync():
                loss = self._backward(x, y)
            total += loss.double() * len(x)
            images += len(x)
            if last:
                self._update(update)
                self._watch(loss, update)
                if self.hook.done:
                    break
        sums = self.world.total(torch.stack([total, torch.tensor(float(images), dtype=torch.float64).to(total)]))
        mean = float(sums[0] / sums[1])
        if not np.isfinite(mean):
            self._diverged(mean, (epoch + 1) * updates)
        return mean, float(sums[1]) / (time.perf_counter() - start)

    def _backward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add this part's gradients; its loss."""
        form = torch.channels_last if self.recipe.channels_last else torch.preserve_format
        x, y = x.to(self.device, memory_format=form, non_blocking=True), y.to(self.device, non_blocking=True)
        if self.mixup is not None:
            x, y = self.mixup(x, y)
        low = torch.float16 if self.recipe.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, low, enabled=self.recipe.amp != "off"):
            loss = self.hook.loss(self.task(x, y))
        torch.autograd.backward(self.scaler.scale(loss / self.recipe.accumulate))
        return loss.detach()

    def _update(self, update: int) -> None:
        self.scaler.unscale_(self.optimizer)
        self.hook.after_backward()
        if self.recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.hook.after_step()
        self.task.update_ema(step=update)

    def _watch(self, loss: torch.Tensor, update: int) -> None:
        """Report the loss, and stop where it is no number."""
        if self.device.type == "cuda" and update % CHECK_EVERY:
            return
        value = loss.item()
        if self.world.size == 1 and not np.isfinite(value):  # with several workers all stop together, at an epoch's end
            self._diverged(value, update + 1)
        if self.on_step:
            self.on_step(update + 1, self.recipe.epochs * self.batches.updates, value)

    def _diverged(self, loss: float, update: int) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        raise Diverged(
            f"the loss is {loss} at update {update} with learning rate {lr:.3g}: lower lr, raise warmup_epochs or "
            "clip more; the state of the last whole epoch is kept"
        )

    def kept_model(self) -> nn.Module:
        """What is evaluated and kept: the average where there is one."""
        average = self.task.get_trainable_module(ema=True)
        return self.model if average is None else average.module

    def keep_average(self) -> None:
        """Put the averaged weights into the model."""
        if self.recipe.ema is not None:
            self.model.load_state_dict(self.kept_model().state_dict(), strict=True)

    def state(self, epoch: int) -> dict[str, Any]:
        """All that a resumed run needs."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.recipe.ema is not None:
            parts["average"] = self.kept_model().state_dict()
        return {"epoch": epoch, **parts, "scaler": self.scaler.state_dict(), "hook": self.hook.state_dict()}

    def resume(self, path: Path | None) -> int:
        """Load the last whole epoch; the number of epochs done."""
        found = load_state(path) if path is not None else None
        if found is None:
            return 0
        if found["hook"].keys() != self.hook.state_dict().keys():
            raise UserError(f"{path}: this run was started with another method of pruning; delete it, or use that one")
        if ("average" in found) != (self.recipe.ema is not None):
            raise UserError(f"{path}: this run was started with another recipe (ema); delete it, or use that one")
        self.model.load_state_dict(found["model"], strict=True)
        self.optimizer.load_state_dict(found["optimizer"])
        if self.recipe.ema is not None:
            self.kept_model().load_state_dict(found["average"], strict=True)
        self.scaler.load_state_dict(found["scaler"])
        self.hook.load_state_dict(found["hook"])
        return int(found["epoch"])


def _batches(data: Data, recipe: Recipe, world: World) -> EpochBatches:
    images, parts = data.train_images, world.size * recipe.accumulate
    if recipe.batch_size > images:
        raise UserError(f"recipe: batch_size = {recipe.batch_size}, but {data.info.name} has {images} training images")
    if recipe.batch_size % parts:
        raise UserError(
            f"recipe: batch_size = {recipe.batch_size} cannot be shared by {world.size} workers with accumulate = "
            f"{recipe.accumulate}: it must be a multiple of {parts}"
        )
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size // parts % 2:
        raise UserError(f"recipe: mixup needs an even number of images at a time, not {recipe.batch_size // parts}")
    return EpochBatches(images, recipe.batch_size, world, accumulate=recipe.accumulate, repeats=recipe.repeats)


def _mixup(recipe: Recipe, classes: int) -> Mixup | None:
    if not (recipe.mixup or recipe.cutmix):
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mix_prob,
        switch_prob=recipe.switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth that rises linearly from 0 at the first block to ``rate`` at the last one."""
    blocks = blocks_of(model)
    for block, p in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):  # a block may lack either half
                setattr(block, name, DropPath(p) if p > 0 else nn.Identity())
