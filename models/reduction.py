"""Reductions of the channels of one space, and their effect on a tensor.

A *space* is a set of channels or units that several tensors share (``models.families.spaces``). A reduction of it is
applied to every axis that counts it, of every tensor, and to nothing else. ``Choose`` keeps some of the channels,
``Project`` maps them onto fewer. ``Family.reductions`` names those that a space allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

__all__ = ["Choose", "Project", "Reduction", "reduce_tensor"]


class Reduction(Protocol):
    """A way to reduce a space: the number of channels that are left, and its effect on a tensor."""

    @property
    def size(self) -> int:
        """Channels of the space that is left."""

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Return a new tensor whose ``axis``, which counted the whole space, counts ``size`` channels."""


class Choose:
    """Keep the channels ``indices``, in that order."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = torch.tensor(indices, dtype=torch.long)

    @property
    def size(self) -> int:
        return len(self.indices)

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Gather along ``axis``."""
        return tensor.index_select(axis, self.indices.to(tensor.device))


class Project:
    """Map the channels by ``matrix`` (channels before, channels left)."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    @property
    def size(self) -> int:
        return self.matrix.shape[1]

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Multiply along ``axis``."""
        return (tensor.movedim(axis, -1) @ self.matrix.to(tensor)).movedim(-1, axis).contiguous()


def reduce_tensor(
    tensor: torch.Tensor,
    axes: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    reductions: Mapping[str, Reduction],
) -> torch.Tensor:
    """Copy ``tensor``, reduced along every axis that counts a space of ``reductions``.

    Args:
        tensor: of any number of axes; it is not changed.
        axes: by axis, the spaces that lie side by side on it (none: kept whole); axes left out are kept whole.
        sizes: size of every space before.
        reductions: by space; what is left out stays whole.
    """
    reduced = tensor
    for axis, spaces in enumerate(axes):
        if not any(space in reductions for space in spaces):
            continue
        parts = torch.split(reduced, [sizes[space] for space in spaces], dim=axis)
        small = [
            reductions[space].apply(part, axis) if space in reductions else part
            for space, part in zip(spaces, parts, strict=True)
        ]
        reduced = small[0] if len(small) == 1 else torch.cat(small, dim=axis)
    return tensor.clone() if reduced is tensor else reduced
