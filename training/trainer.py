"""One worker's part of the training loop: epochs, updates, gradients, and the state that is saved."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.layers import DropPath
from timm.task import TrainingTask
from timm.utils import distribute_bn
from torch import nn

from prunesweep.models import UserError, arch_of, blocks_of
from prunesweep.models.feature_head import is_headless
from prunesweep.models.memory import out_of_memory
from prunesweep.pruners.hook import Hook, TrainingHook

from .batches import EpochBatches
from .checkpoint import load_state
from .closest import ClosestModel, trained_images
from .compatibility import check_features, check_labels
from .data import Data
from .optim import make_optimizer, make_scheduler
from .recipe import Recipe
from .settling import check_settles
from .task import make_task
from .teacher_cache import cache_teachers
from .world import World

__all__ = ["Diverged", "DoesNotFit", "Trainer", "batches_of"]

CHECK_EVERY = 20  # updates between two reads of the loss on a GPU, because reading waits for it
MANUAL_SYNC_STEPS = 2  # updates before DDP takes over: the second one is the first with the optimizer's state in memory


class Diverged(UserError):
    """The loss is not finite any more."""


class DoesNotFit(UserError):
    """Not even one image at a time fits into the memory of every worker's device."""


class Trainer:
    """A model with its task, optimizer and schedule; the arguments are those of ``training.fit``.

    Several workers do their first ``MANUAL_SYNC_STEPS`` updates without DistributedDataParallel, and all of them if
    there is a hook: gradients are then averaged after the backward pass. This has three reasons. Workers can agree on
    how many images fit into memory, which is too late in the middle of DDP's reductions. DDP learns whether parameters
    go unused. A hook may have parameters in its loss alone, or lead the forward pass around parts of the model.
    BatchNorm normalises by a worker's own images (those of one forward pass), as in timm; its running statistics are
    averaged after every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        hook: TrainingHook[Any],
        teacher: nn.Module | None,
        world: World,
        *,
        teacher_cache: Path | None,
        on_step: Callable[[int, int, float], None] | None,
        on_note: Callable[[str], None] | None,
    ) -> None:
        self.model, self.recipe, self.hook, self.world = model, recipe, hook, world
        self.on_step, self.on_note = on_step, on_note
        if is_headless(model):
            check_features(recipe, arch_of(model).source)
        check_labels(data, recipe)
        check_settles(recipe, source=teacher is not None, method=type(hook) is not Hook)
        self.device = next(model.parameters()).device
        self.batches = batches_of(data, recipe, world)
        self.micro_batch = recipe.batch_size // (world.size * recipe.accumulate)  # images of one forward pass
        _set_drop_path(model, recipe.drop_path)
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        hook.wrap(model)
        self.task: TrainingTask = make_task(model, recipe, teacher).to(self.device)
        known = cache_teachers(self.task, data, recipe, world, teacher_cache, on_note)
        self.loader = data.train_loader(self.batches, recipe, known)
        if recipe.ema is not None:
            self.task.setup_ema(decay=recipe.ema)
        self.optimizer = make_optimizer(model, hook, recipe)
        if recipe.compile:
            self.task.compile()
        alone, plain = world.size == 1, type(hook) is Hook
        self.manual_sync_steps: float = 0 if alone else MANUAL_SYNC_STEPS if plain else math.inf  # left to do
        self.scheduler = make_scheduler(self.optimizer, recipe, self.batches.updates)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.closest: ClosestModel | None = None
        if recipe.keep == "best" and recipe.epochs:
            assert teacher is not None  # the recipe was settled
            self.closest = ClosestModel(data, recipe, teacher.to(self.device), world)
        self.labelled = data.info.labelled
        self.mixup = _mixup(recipe, data.info.num_classes or arch_of(model).outputs)

    def train_epoch(self, epoch: int) -> tuple[float, float]:
        """Train for one epoch; return the mean loss, and images per second, over all workers."""
        self.task.train()
        self.hook.start_epoch()
        parts, updates = self.recipe.accumulate, self.batches.updates
        total, done, start = torch.zeros((), dtype=torch.float64, device=self.device), 0, time.perf_counter()
        for index, piece in enumerate(self.loader):
            update = epoch * updates + index // parts
            if index % parts == 0:
                self.scheduler.step_update(update)
                self.optimizer.zero_grad(set_to_none=True)
                share, randomness = [], _Randomness(self.device)
                loss = torch.zeros_like(total)
            share.append(piece)
            last = len(share) == parts
            loss = self._add_gradients(share, loss, randomness, last=last)
            if last:
                self._update(update)
                total += loss
                done += 1
                self._watch(loss, update)
                if self.hook.done:
                    break
        sums = self.world.all_reduce(torch.stack([total, torch.tensor(float(done), dtype=torch.float64).to(total)]))
        mean = float(sums[0] / sums[1])
        if not np.isfinite(mean):
            self._diverged(mean, (epoch + 1) * updates)
        if self.world.size > 1:  # BatchNorm's running statistics are the only state that workers do not share
            for model in self._models():
                distribute_bn(model, self.world.size, reduce=True)
        return mean, done * self.recipe.batch_size / (time.perf_counter() - start)

    def _add_gradients(
        self, share: list[Any], loss: torch.Tensor, randomness: _Randomness, *, last: bool
    ) -> torch.Tensor:
        """Add the gradients of the newest piece of a batch's share; return the loss of the share so far.

        If a piece does not fit into memory, all pieces of the share are done again in smaller parts.
        """
        todo = share[-1:]
        while True:
            fits = True
            try:
                for index, piece in enumerate(todo, start=len(share) - len(todo) + 1):
                    loss = loss + self._backward(piece, sync=last and index == len(share))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self.world.size > 1 and not self.manual_sync_steps:
                    raise  # the others are in DDP's reductions: start again
                fits = False
            if self.manual_sync_steps:
                flag = torch.tensor(float(not fits), device=self.device)
                fits = self.world.all_reduce(flag).item() == 0
            if fits:
                return loss
            self._halve()
            randomness.restore()
            todo, loss = share, torch.zeros_like(loss)

    def _halve(self) -> None:
        """Halve the number of images per forward pass, and drop the gradients of this batch."""
        found, self.micro_batch = self.micro_batch, (self.micro_batch + 1) // 2
        if found == 1:
            raise DoesNotFit(
                "out of memory with one image at a time: take a smaller model or smaller images, set amp, or use a "
                "device with more memory"
            )
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.on_note:
            self.on_note(
                f"out of memory with {found} images at a time: going on with {self.micro_batch}, which changes no "
                f"batch (batch_size = {self.recipe.batch_size})"
            )

    def _backward(self, piece: Any, *, sync: bool) -> torch.Tensor:
        """Add a piece's gradients; return its part of the loss. DDP averages after this piece if ``sync``."""
        x, y, *known = piece
        form = torch.channels_last if self.recipe.channels_last else torch.preserve_format
        mixes = self.mixup is not None  # in place, and the images may be needed once more
        x = x.to(self.device, memory_format=form, non_blocking=True, copy=mixes)
        y = y.to(self.device, non_blocking=True)
        known = [{name: rows.to(self.device, non_blocking=True) for name, rows in k.items()} for k in known]
        if self.mixup is not None:
            x, y = self.mixup(x, y if self.labelled else torch.zeros_like(y))  # it mixes images of some class
        low = torch.float16 if self.recipe.amp == "fp16" else torch.bfloat16
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(x), self.micro_batch):
            own = slice(start, start + self.micro_batch)
            weight = len(x[own]) / len(x) / self.recipe.accumulate
            final = sync and own.stop >= len(x)
            with contextlib.nullcontext() if final else self.task.no_sync():
                with torch.autocast(self.device.type, low, enabled=self.recipe.amp != "off"):
                    rows = [{name: r[own] for name, r in k.items()} for k in known]
                    loss = self.hook.loss(self.task(x[own], y[own], *rows))
                torch.autograd.backward(self.scaler.scale(loss * weight))
            total += loss.detach().double() * weight
        return total

    def _update(self, update: int) -> None:
        if self.manual_sync_steps:
            self._average_gradients()
        self.scaler.unscale_(self.optimizer)
        self.hook.after_backward()
        if self.recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.hook.after_step()
        self.task.update_ema(step=update)

    def _average_gradients(self) -> None:
        """Average gradients over workers after the backward pass, until DDP takes over."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        own = torch.tensor([float(p.grad is not None) for p in trained], device=self.device)
        used = [p for p, workers in zip(trained, self.world.all_reduce(own).tolist(), strict=True) if workers]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
        mean = self.world.all_reduce(torch.cat([g.flatten() for g in gradients])) / self.world.size
        for p, values in zip(used, torch.split(mean, [p.numel() for p in used]), strict=True):
            p.grad = values.view_as(p)
        self.manual_sync_steps -= 1
        if self.manual_sync_steps == 0:
            self.task.prepare_distributed(
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=len(used) < len(trained),
                broadcast_buffers=False,
                init_sync=False,
            )

    def _watch(self, loss: torch.Tensor, update: int) -> None:
        """Report the loss, and raise Diverged if it is not finite."""
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
        """Return the model that is evaluated and kept: the averaged one if the recipe has ``ema``."""
        average = self.task.get_trainable_module(ema=True)
        return self.model if average is None else average.module

    def _models(self) -> list[nn.Module]:
        """Return the model and, if there is one, its average."""
        return [self.model] if self.recipe.ema is None else [self.model, self.kept_model()]

    def keep_average(self) -> None:
        """Copy the averaged weights into the model."""
        if self.recipe.ema is not None:
            self.model.load_state_dict(self.kept_model().state_dict(), strict=True)

    def state(self, epoch: int) -> dict[str, Any]:
        """Return everything that a resumed run needs, after ``epoch`` epochs."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.recipe.ema is not None:
            parts["average"] = self.kept_model().state_dict()
        if self.closest is not None:
            parts["closest"] = self.closest.state_dict()
        return {"epoch": epoch, **parts, "scaler": self.scaler.state_dict(), "hook": self.hook.state_dict()}

    def resume(self, path: Path | None) -> int:
        """Load the state of the last whole epoch, and give all workers the same weights.

        Args:
            path: file of the state; None, or a file that is not there or is damaged, starts from the beginning.

        Returns:
            The number of epochs done.

        Raises:
            UserError: the state is from a run with another method of pruning or another recipe.
        """
        found = load_state(path) if path is not None else None
        if found is None and path is not None and path.exists() and self.on_note:
            self.on_note(f"{path} is damaged, or of another version: training begins anew")
        if found is not None:
            self._load(found, path)
        for model in self._models():
            for tensor in model.state_dict().values():
                self.world.broadcast(tensor)
        return 0 if found is None else int(found["epoch"])

    def _load(self, found: dict[str, Any], path: Path | None) -> None:
        if found["hook"].keys() != self.hook.state_dict().keys():
            raise UserError(f"{path}: this run was started with another method of pruning; delete it, or use that one")
        if ("average" in found) != (self.recipe.ema is not None):
            raise UserError(f"{path}: this run was started with another recipe (ema); delete it, or use that one")
        if ("closest" in found) != (self.closest is not None):
            raise UserError(f"{path}: this run was started with another recipe (keep); delete it, or use that one")
        self.model.load_state_dict(found["model"], strict=True)
        self.optimizer.load_state_dict(found["optimizer"])
        if self.recipe.ema is not None:
            self.kept_model().load_state_dict(found["average"], strict=True)
        if self.closest is not None:
            self.closest.load_state_dict(found["closest"])
        self.scaler.load_state_dict(found["scaler"])
        self.hook.load_state_dict(found["hook"])


class _Randomness:
    """A snapshot of the generators that mixup and stochastic depth draw from."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.legacy, self.cpu = device, np.random.get_state(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        np.random.set_state(self.legacy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def batches_of(data: Data, recipe: Recipe, world: World) -> EpochBatches:
    """Return the sampler of this worker's share of every batch.

    Args:
        data: the data set.
        recipe: gives batch size, accumulation and repeats.
        world: the workers.

    Raises:
        UserError: the batch size does not fit the data or the workers.
    """
    only, parts = trained_images(data.train_images, recipe), world.size * recipe.accumulate
    images = data.train_images if only is None else len(only)
    if recipe.batch_size > images:
        held = "" if only is None else f" that are not held out (held_out = {recipe.held_out:g})"
        raise UserError(
            f"recipe: batch_size = {recipe.batch_size}, but {data.info.name} has {images} training images{held}"
        )
    if recipe.batch_size % parts:
        raise UserError(
            f"recipe: batch_size = {recipe.batch_size} cannot be shared by {world.size} workers with accumulate = "
            f"{recipe.accumulate}: it must be a multiple of {parts}"
        )
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size // parts % 2:
        raise UserError(f"recipe: mixup needs an even number of images at a time, not {recipe.batch_size // parts}")
    options: dict[str, Any] = {"accumulate": recipe.accumulate, "repeats": recipe.repeats, "only": only}
    return EpochBatches(images, recipe.batch_size, world, **options)


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
    """Set stochastic depth that rises linearly from 0 at the first block to ``rate`` at the last one."""
    vars(model).get("given_drop_rates", {}).pop("drop_path_rate", None)  # what it was created with no longer holds
    blocks = blocks_of(model)
    for block, p in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):  # a block may lack either half
                setattr(block, name, DropPath(p) if p > 0 else nn.Identity())
