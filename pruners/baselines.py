"""Baselines that any real method has to beat: weight magnitude, and chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prunesweep.models import arch_of
from prunesweep.models.families import FamiliesWith

from .coupled import KINDS, coupled_sums
from .scores import Scores, vector_sizes

__all__ = ["FAMILIES", "KINDS", "score_magnitude", "score_random"]

FAMILIES = FamiliesWith("width")


def score_magnitude(
    model: nn.Module, batches: Sequence[Any] = (), *, progress: Callable[[int, int], None] | None = None
) -> Scores:
    """Score every unit by the mean absolute weight of everything that is cut with it.

    As a mean and not a sum, it makes units of all kinds comparable.
    Args:
        model: one that ``Arch.from_timm`` accepts.
        batches: not used; all methods are called alike.
        progress: called with (1, 1) at the end.
    """
    arch = arch_of(model)
    weights = {name: p.detach() for name, p in model.named_parameters() if name.endswith(".weight")}
    sums = coupled_sums(arch, {name: w.abs() for name, w in weights.items()})
    counts = coupled_sums(arch, {name: torch.ones_like(w) for name, w in weights.items()})
    if progress:
        progress(1, 1)
    return Scores({name: sums[name] / counts[name] for name in sums}, {"method": "magnitude", "arch": arch.hash})


def score_random(
    model: nn.Module,
    batches: Sequence[Any] = (),
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score every unit by a uniform random number in [0, 1).

    Args:
        model: one that ``Arch.from_timm`` accepts.
        batches: not used; all methods are called alike.
        seed: of the random numbers.
        progress: called with (1, 1) at the end.
    """
    arch = arch_of(model)
    generator = torch.Generator().manual_seed(seed)
    sizes = vector_sizes(arch, KINDS)
    vectors = {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    if progress:
        progress(1, 1)
    return Scores(vectors, {"method": "random", "arch": arch.hash, "seed": seed})
