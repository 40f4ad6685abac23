"""Features on the grid of patches, for dense heads: segmentation, detection, depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .builder import arch_of
from .errors import UserError
from .families import family_of, names_with

__all__ = ["features"]


def features(model: nn.Module, x: torch.Tensor, block: int | None = None) -> torch.Tensor:
    """Return the features of every patch, of a model of one stage: (B, rows, columns, D), row by row as in the image.

    A token plan gives fewer tokens to the inside of a block only, so the grid is whole behind every block, however
    many tokens were merged or pruned.

    Args:
        model: a ViT or SAM that ``Arch.from_timm`` accepts, planned or not.
        x: images (B, C, image rows, image columns).
        block: behind which block; behind the last one, and the model's last norm or SAM's neck, by default.

    Raises:
        UserError: another family, or a block that does not exist.
    """
    arch = arch_of(model)
    if not family_of(arch).supports("features"):
        able = names_with("features")
        raise UserError(f"features: {arch.source} is of family {arch.family!r}; a grid of tokens is what {able} gives")
    if block is not None and not 0 <= block < arch.depth:
        raise UserError(f"features: block = {block}: {arch.source} has blocks 0..{arch.depth - 1}")
    timm_model: Any = model
    (tokens,) = timm_model.forward_intermediates(
        x,
        indices=[arch.depth - 1 if block is None else block],
        norm=block is None,
        output_fmt="NLC",
        stop_early=True,
        intermediates_only=True,
    )
    return tokens.unflatten(1, arch.stages[0].grid)
