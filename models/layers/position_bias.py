"""Attention whose logits have a term for how far apart two places are (relative position bias).

Shapes: B batch, N tokens, D residual width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import RelPosBias, RelPosMlp
from torch import nn

from prunesweep.models.arch import PositionBias

from .rotary import RotaryAttention

__all__ = ["BiasedAttention", "LogDistanceBias", "make_position_bias"]


def make_position_bias(bias: PositionBias, grid: tuple[int, int], heads: int, prefix_tokens: int) -> nn.Module:
    """Make timm's module of a block's biases, whose ``get_bias`` gives them as (1, H, N, N).

    Args:
        bias: its record.
        grid: rows and columns of patches.
        heads: H.
        prefix_tokens: without a place: of a table they have entries of their own, of an MLP their biases are 0.
    """
    made: nn.Module = (
        RelPosBias(grid, heads, prefix_tokens)
        if bias.kind == "table"
        else LogDistanceBias(grid, heads, bias.hidden, prefix_tokens)
    )
    return made


class LogDistanceBias(RelPosMlp):  # type: ignore[misc]  # timm is untyped
    """timm's ``RelPosMlp`` whose distances, which no state dict has, are not rounded to less than float32.

    It has no dropout, in training neither: records have none.
    """

    rel_coords_log: torch.Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mlp.drop1 = nn.Dropout(0.0)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LogDistanceBias:
        exact = self.rel_coords_log
        super()._apply(fn, recurse)
        if self.rel_coords_log.dtype in (torch.float16, torch.bfloat16):
            self.rel_coords_log = exact.to(self.rel_coords_log.device)
        return self

    def get_bias(self) -> torch.Tensor:
        """Compute the biases, (1, H, N, N)."""
        distances = self.rel_coords_log.to(self.mlp.fc1.weight.dtype)
        table = self.mlp(distances).flatten(0, 1)[self.relative_position_index]
        bias = rearrange(table, "(n m) h -> 1 h n m", n=self.window_area)
        return F.pad(bias, [self.prefix_tokens, 0, self.prefix_tokens, 0]).contiguous()


class BiasedAttention(RotaryAttention):
    """Self-attention of any widths, nothing of which is turned, with position biases of its own in ``rel_pos``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim: int,
        v_dims: Sequence[int],
        scale: float,
        *,
        bias: PositionBias,
        grid: tuple[int, int],
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, qk_dim, v_dims, scale, None, **options)
        self.rel_pos: Any = make_position_bias(bias, grid, num_heads, self.prefix_tokens)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        coordinates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over tokens, (B, N, D) to the same; ``attn_mask`` is added to the biases, the rest is not used."""
        bias = self.rel_pos.get_bias()
        return super().forward(x, attn_mask=bias.to(x.dtype) if attn_mask is None else bias.to(x.dtype) + attn_mask)
