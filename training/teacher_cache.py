"""Compute a teacher's logits on every training image once, for terms of distillation with ``cache_teacher``.

This is right only if an image looks the same in every epoch; ``Recipe`` checks that (``fixed_view``, no mixing). On
disk the logits lie in shards of ``SHARD`` images, in a folder named by the hash of the teacher's weights, the data and
the input settings. A shard is written whole or not at all, and carries that hash and one of its numbers, both of which
are compared before it is used.

Source of the warning against it: a teacher that sees other views than the student, or always the same one, is a worse
teacher (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022, figure 3).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import DataLoader

from prunesweep.models import UserError, arch_of, weights_digest
from prunesweep.models.io.digest import read_tensors, tensors_digest, write_tensors
from prunesweep.models.io.files import make_folder, publish_file

from .data import Data
from .recipe import Recipe
from .task import DistillationTask, make_task
from .world import World

__all__ = ["SHARD", "TeacherLogits", "cache_logits", "cache_teachers", "is_shard", "missing_shards", "shard_file"]

FORMAT = "prunesweep/teacher/1"  # to be counted up when the answers change, so that no older ones are believed
SHARD = 8192  # images
BATCH = 256  # images of all workers at a time


class TeacherLogits:
    """A teacher's logits by training image: item i is its answer (K,) to image i.

    Args:
        shards: logits of ``SHARD`` images each, (SHARD, K); the last one may be shorter.
        folder: where the shards are kept on disk, if they are.
    """

    def __init__(self, shards: list[torch.Tensor], folder: Path | None = None) -> None:
        self.shards, self.folder = shards, folder

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.shards[index // SHARD][index % SHARD]


def cache_logits(
    source: nn.Module,
    data: Data,
    recipe: Recipe,
    folder: Path,
    on_images: Callable[[int, int], None],
    *,
    shards: Sequence[int] | None = None,
) -> tuple[Path, ...]:
    """Compute the logits that a recipe asks for, before any training by it, or find them in ``folder``.

    Args:
        source: the model that students are cut from, on its device.
        data: data set of the trainings to come.
        recipe: recipe of the trainings to come.
        folder: where the logits are kept; the trainings find them with this folder as their ``teacher_cache``.
        on_images: called with (images answered, images in all).
        shards: numbers of the shards to compute, ``SHARD`` images each; the others are another process's. All by
            default.

    Returns:
        A folder in ``folder`` for each teacher; none if the recipe has no ``cache_teacher``.

    Raises:
        UserError: a teacher cannot be loaded, or does not fit the model.
    """
    cached = _cached_terms(recipe)
    if cached is None:
        return ()
    task = make_task(source, cached, source).to(next(source.parameters()).device)
    found = cache_teachers(task, data, cached, World.current(), folder, on_images=on_images, shards=shards)
    return tuple(logits.folder for logits in found.values() if logits.folder)


def missing_shards(source: nn.Module, data: Data, recipe: Recipe, folder: Path) -> list[int]:
    """Return the numbers of the shards that ``cache_logits`` would have to compute. Arguments are as for that."""
    cached = _cached_terms(recipe)
    if cached is None:
        return []
    task = make_task(source, cached, source)
    names = dict.fromkeys(term.teacher for term in cached.distill)
    places = [folder / _key(task, name, data, cached) for name in names] if isinstance(task, DistillationTask) else []
    numbers = range(-(-data.train_images // SHARD))
    return [number for number in numbers if not all(shard_file(place, number).exists() for place in places)]


def _cached_terms(recipe: Recipe) -> Recipe | None:
    """The recipe with those terms alone whose teachers are asked once; None where it has none."""
    terms = tuple(term for term in recipe.distill if term.cache_teacher and term.weight)
    return recipe.model_copy(update={"distill": terms}) if terms else None  # others may have hooks put on the source


def shard_file(place: Path, shard: int) -> Path:
    """The file of a shard of logits in their folder."""
    return place / f"{shard:05}.safetensors"


def cache_teachers(
    task: TrainingTask,
    data: Data,
    recipe: Recipe,
    world: World,
    folder: Path | None,
    on_note: Callable[[str], None] | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
    shards: Sequence[int] | None = None,
) -> dict[str, TeacherLogits]:
    """Compute the logits of all teachers whose terms have ``cache_teacher``, with all workers together.

    The task drops the teachers that it no longer needs.

    Args:
        task: the training task; only a ``DistillationTask`` has teachers.
        data: the data set; its training images are answered as for evaluation.
        recipe: the recipe, for its ``amp``.
        world: the workers.
        folder: where the logits are kept; None keeps them in memory.
        on_note: called with a line of text before logits are computed.
        on_images: called with (images answered, images in all).
        shards: as for ``cache_logits``; what is returned then is not to be asked by image.

    Returns:
        The logits by the teacher's name.

    Raises:
        UserError: another worker cannot read what the first one wrote to ``folder``.
    """
    if not isinstance(task, DistillationTask):
        return {}
    found = {}
    for name in dict.fromkeys(term.teacher for term in task.terms if term.cache_teacher):
        place = None if folder is None else folder / _key(task, name, data, recipe)
        if on_note and not (place and place.exists()):
            on_note(f"computing the logits of teacher {name!r} on {data.train_images:,} images")
        with torch.random.fork_rng():  # a run that finds them must draw what one that computes them does
            answers = [
                _shard(task, name, data, recipe, world, place, start, on_images)
                for start in range(0, data.train_images, SHARD)
                if shards is None or start // SHARD in shards
            ]
        found[name] = TeacherLogits(answers, place)
    task.release_cached_teachers()
    return found


def _key(task: DistillationTask, name: str, data: Data, recipe: Recipe) -> str:
    """Return 16 hex digits that hash everything the logits depend on."""
    teacher: Any = task.teacher(name).model
    try:
        form = arch_of(teacher).hash  # weights alone do not tell the number of heads
    except UserError:  # a teacher of a family that is not pruned
        form = teacher.pretrained_cfg.get("architecture")
    normalised = [[cfg["mean"], cfg["std"]] for cfg in (teacher.pretrained_cfg, task.student_cfg)]
    facts = [FORMAT, weights_digest(teacher), form, data.info.fingerprint, normalised, recipe.amp]
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()[:16]


def is_shard(file: Path) -> bool:
    """Whether a file is a shard that carries the key that its folder is named by, and holds what was written."""
    try:
        tensors, facts = read_tensors(file)
    except UserError:
        return False
    return facts.get("key") == file.parent.name and facts.get("sha256") == tensors_digest(tensors)


def _shard(
    task: DistillationTask,
    name: str,
    data: Data,
    recipe: Recipe,
    world: World,
    place: Path | None,
    start: int,
    on_images: Callable[[int, int], None],
) -> torch.Tensor:
    """Return the logits of the shard from image ``start`` on, read or computed.

    The first worker decides which, and writes what was computed.
    """
    file = None if place is None else shard_file(place, start // SHARD)
    known = torch.tensor(float(world.first and file is not None and is_shard(file)), device=task.device)
    if world.all_reduce(known).item() == 0:
        images = range(start, min(start + SHARD, data.train_images))
        logits = _logits(task, name, data, recipe, world, images, on_images)
        if file is None:
            return logits
        if world.first:
            make_folder(file.parent)
            with publish_file(file) as scratch:
                tensors = {"logits": logits}
                facts = {"key": file.parent.name, "sha256": tensors_digest(tensors)}
                write_tensors(tensors, scratch, facts)
        world.all_reduce(known)  # nobody reads before it is written
    assert file is not None
    missing = world.all_reduce(torch.tensor(float(not file.exists()), device=task.device)).item()
    if missing:
        raise UserError(f"{file}: not there for {missing:.0f} of {world.size} workers: take a folder that all can read")
    return load_file(file)["logits"]


@torch.no_grad()
def _logits(
    task: DistillationTask,
    name: str,
    data: Data,
    recipe: Recipe,
    world: World,
    images: range,
    on_images: Callable[[int, int], None],
) -> torch.Tensor:
    """Compute logits (images, K): every worker answers its share of every batch, and all get the whole."""
    split, low = data.split("train", augment=None), torch.float16 if recipe.amp == "fp16" else torch.bfloat16
    batches = [list(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    own = [batch[world.rank :: world.size] or batch[:1] for batch in batches]  # nobody has an empty batch
    loader = DataLoader(split, batch_sampler=own, num_workers=data.loader_workers)
    found = []
    for batch, (x, _) in zip(batches, loader, strict=True):
        with torch.autocast(task.device.type, low, enabled=recipe.amp != "off"):
            answers = task.answers(name, x.to(task.device))
        rows = answers.new_zeros(len(batch), answers.shape[1])
        if world.rank < len(batch):
            rows[world.rank :: world.size] = answers
        found.append(world.all_reduce(rows).cpu())
        on_images(batch[-1] + 1, data.train_images)
    return torch.cat(found)
