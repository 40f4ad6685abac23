"""The one training loop: in one process, and as every worker of a process group (Ray Train's or torchrun's).

Everything random in an epoch follows from (seed, epoch, rank), so a run that was interrupted and resumed from its last
epoch gives what an uninterrupted one gives. Batches follow from (seed, epoch) alone, so any number of workers sees the
same images. timm provides the task (loss), the averaging of weights, the optimizer and the schedule.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunesweep.models import arch_of
from prunesweep.models.builder import set_label_names
from prunesweep.models.feature_head import is_headless
from prunesweep.models.precision import HALF, stored_dtype, to_float32, widened
from prunesweep.pruners.hook import Hook, TrainingHook

from .checkpoint import save_state
from .closest import Kept
from .data import Data, check_words
from .evaluation import evaluate_on
from .recipe import Recipe
from .settling import settled
from .trainer import Diverged, Trainer
from .world import World

__all__ = ["Diverged", "Epoch", "fit", "name_classes", "seeded"]

FIGURES = (
    "top1",
    "top5",
    "balanced",
    "ppl",
    "agreement",
    "kl",
    "cosine",
    "relative_error",
    "images",
)  # of an evaluation


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch: mean training ``loss``, validation accuracies in percent, ``images_per_s`` of training.

    For a language model, images are pieces of text, accuracy is that of the next word, and ``ppl`` is the perplexity.
    Without labels there are ``agreement`` with the teacher's answers, in percent, and ``kl`` in place of accuracies; of
    a backbone without a head, ``cosine`` and ``relative_error`` of its features to the teacher's.
    """

    epoch: int  # from 1
    epochs: int
    loss: float
    top1: float | None
    top5: float | None
    lr: float
    images_per_s: float
    facts: Mapping[str, float | str] = field(default_factory=dict)  # figures of a method that prunes meanwhile
    ppl: float | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    relative_error: float | None = None
    val_loss: float | None = None  # mean cross-entropy of the evaluation
    images: int | None = None  # that it is of
    balanced: float | None = None  # mean of the classes' recalls, in percent


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators for a ``with`` block, and restore them afterwards."""
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
    teacher_cache: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_kept: Callable[[Kept], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    halvings: int = 0,
) -> bool:
    """Train ``model`` in place, in float32 where its weights are in half precision.

    In a process group, every worker calls this with the same model, data and recipe.

    Args:
        model: a classifier with timm's ``pretrained_cfg``; ends in eval mode, with the data's class names. Images are
            in its type.
        data: data set to train and evaluate on.
        recipe: epochs, optimizer, augmentation and losses.
        teacher: the model that the recipe's distillation terms call the source; moved to the model's device.
        hook: a method that prunes while the model trains: a new one, or one like that of the run that ``state`` is
            from. It may end the training early. The caller calls its ``finish``.
        seed: together with the epoch's number fixes order, augmentation and stochastic depth.
        state: file that keeps the state after every epoch, from which an unfinished run is resumed; the first worker
            writes it, all of them read it.
        teacher_cache: folder, the same one for all workers, that keeps the logits that ``Distill.cache_teacher`` asks
            for; without it they are kept in memory, for this run.
        on_step: called with (updates done, updates in all, loss of this worker).
        on_epoch: called after every epoch's evaluation, on every worker, with the same numbers.
        on_note: called with a line for people, such as that a batch did not fit into the device's memory and goes
            through the model in smaller parts from now on.
        on_kept: told, on every worker, which epoch's model it is in the end, if the recipe says ``keep = "best"``.
        should_stop: called after every epoch; training ends if it returns True on any worker.
        halvings: how often the number of images that go through the model at a time is halved from the start, where it
            is known that more do not fit into memory; batches stay the same.

    Returns:
        True if all epochs are done, False if ``should_stop`` ended training.

    Raises:
        UserError: the data do not fit the model, the batch does not fit the data or the workers, a teacher is missing,
            not even one image fits into memory, or ``state`` is from a run with another kind of hook.
        Diverged: the loss is not finite; ``state`` has the last epoch before.
    """
    recipe = settled(recipe, data, model, teacher)
    hook = Hook() if hook is None else hook
    check_words(arch_of(model), data)
    model = to_float32(model) if stored_dtype(model) in HALF else model
    teacher = None if teacher is None else widened(teacher)
    reports: dict[str, Any] = {"on_step": on_step, "on_note": on_note}
    trainer = Trainer(model, data, recipe, hook, teacher, World.current(), teacher_cache=teacher_cache, **reports)
    for _ in range(halvings):
        trainer.micro_batch = (trainer.micro_batch + 1) // 2
    done = trainer.resume(state)
    finished = done == recipe.epochs or hook.done
    closest = trainer.closest
    if closest is not None and done == 0:
        closest.consider(trainer.kept_model())
    for epoch in range(recipe.epochs if finished else done, recipe.epochs):
        with seeded(_mix(seed, epoch, trainer.world.rank)):
            trainer.batches.start(_mix(seed, epoch, 0))
            loss, rate = trainer.train_epoch(epoch)
        facts = dict(hook.facts)
        if closest is not None:
            facts[f"held_out_{closest.measure}"] = closest.consider(trainer.kept_model())
        if state is not None and trainer.world.first:
            save_state(state, trainer.state(epoch + 1))
        if on_epoch:
            found = evaluate_on(trainer.kept_model(), data, trainer.world, source=teacher)
            figures: dict[str, Any] = {name: found.get(name) for name in FIGURES}
            figures["val_loss"] = found.get("loss")
            lr = trainer.optimizer.param_groups[0]["lr"]
            on_epoch(Epoch(epoch + 1, recipe.epochs, loss, lr=lr, images_per_s=rate, facts=facts, **figures))
        finished = epoch + 1 == recipe.epochs or hook.done
        stop = should_stop is not None and should_stop()
        if finished or trainer.world.all_reduce(torch.tensor(float(stop), device=trainer.device)) > 0:
            break
    if finished:
        trainer.keep_average()
        if closest is not None:
            closest.restore(model, on_kept)
        if recipe.epochs:
            name_classes(model, data)
    model.eval()
    return finished


def name_classes(model: Any, data: Data) -> None:
    """Give a model the names of the classes that it was trained on, by which later data are matched with it."""
    names = data.info.classes
    if names and data.info.labelled and len(names) == getattr(model, "num_classes", 0) and not is_headless(model):
        set_label_names(model, names)


def _mix(seed: int, epoch: int, rank: int) -> int:
    """Return a seed for an epoch and a worker; neighbouring seeds, epochs and workers share none."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
