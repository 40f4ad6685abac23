"""SPViT's binary gates as pure functions (He et al., arXiv 2111.11802, section 3.3, and the released code).

A gate is open with probability p = sigmoid(theta). A block's mixer has three of them, cumulated, so that the open ones
are always a prefix: none is ``skip``, then ``conv1x1``, ``conv3x3``, ``msa``. An MLP has one for every hidden unit.
Training draws gates; evaluation opens those with p > 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["CHOICES", "choice_of", "cumulate", "expect", "is_open", "sample", "uniforms"]

CHOICES = ("skip", "conv1x1", "conv3x3", "msa")  # by the number of open gates


def is_open(theta: torch.Tensor) -> torch.Tensor:
    """Return whether p > 0.5, bool, of the same shape."""
    return theta > 0


def choice_of(theta: torch.Tensor) -> str:
    """Return the mixer that three thetas choose."""
    return CHOICES[int(is_open(theta).cumprod(-1).sum())]


def _straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Return the value of ``hard``, to the last bit, with the gradient of ``soft``."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def sample(theta: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Draw gates, 0 or 1: open where u > 1 - p.

    The gradient is that of the relaxed Bernoulli variable of temperature 1, sigmoid(theta + log u - log(1 - u)).

    Args:
        theta: parameters of the gates, with p = sigmoid(theta).
        u: uniform numbers in [0, 1), of the same shape.

    Returns:
        Gates of the same shape and dtype.
    """
    eps = torch.finfo(theta.dtype).eps
    u = u.clamp(eps, 1 - eps)
    soft = (theta + u.log() - (-u).log1p()).sigmoid()
    return _straight_through(soft > 0.5, soft)


def cumulate(gates: torch.Tensor) -> torch.Tensor:
    """Compute cumulated products over the last axis; a gate that is followed by another open one gets no gradient.

    "Slow down the less complex gates": only the last open gate and the closed ones behind it get a gradient.
    """
    cumulated = gates.cumprod(-1)
    followed = F.pad(cumulated.detach()[..., 1:] > 0.5, (0, 1), value=False)
    return torch.where(followed, cumulated.detach(), cumulated)


def expect(theta: torch.Tensor) -> torch.Tensor:
    """Return the gate in the complexity loss, without a draw: 1[p > 0.5], with the gradient of sigmoid(p - 0.5)."""
    return _straight_through(is_open(theta), (theta.sigmoid() - 0.5).sigmoid())


def uniforms(sizes: Sequence[int], seed: int, step: int, rank: int = 0) -> list[torch.Tensor]:
    """Draw vectors of uniform numbers in [0, 1), on the CPU, from (seed, step, rank) alone.

    Args:
        sizes: length of every vector.
        seed: of the run.
        step: number of the optimizer step.
        rank: of the worker; 0 for numbers that all workers share.
    """
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
    return list(torch.split(torch.rand(sum(sizes), generator=generator), list(sizes)))
