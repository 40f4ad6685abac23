"""Attention by the cosine of queries and keys, within windows (Swin V2, arXiv 2111.09883).

    y_h = softmax(s_h cos(Q_h, K_h) + 16 sigmoid(MLP(distance))) V_h

The factor s_h is learned, at most 100; distances are logarithms of differences of rows and columns, as parts of the
window or of the one that the source was trained with. Keys have no bias.

Shapes: B batch, N tokens of a window, D residual width, H heads, E query/key width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer_v2 import WindowAttention
from torch import nn

from prunesweep.models.arch import Block

from .mixers import attend

__all__ = ["HIDDEN", "CosineWindowAttention", "Directions"]

HIDDEN = 512  # units of the MLP of distances, in every published model
LARGEST = math.log(100.0)  # of the logarithm of a factor


class Directions(nn.Module):
    """Divides queries or keys (B, H, N, E) by their length; ``factors`` gives numbers (H, 1, 1) that multiply them."""

    def __init__(self, factors: Callable[[], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        """Compute (B, H, N, E)."""
        unit = F.normalize(q, dim=-1, eps=max(1e-12, torch.finfo(q.dtype).tiny))  # zeros stay zeros in float16, too
        return unit if self.factors is None else unit * self.factors().to(unit.dtype)


class CosineWindowAttention(WindowAttention):  # type: ignore[misc]  # timm is untyped
    """timm's attention of Swin V2 with any widths; queries, keys and values have projections of their own.

    Args:
        dim: D.
        block: the block's record; its ``scale`` is 1.
        window: rows and columns of a window.
        reference: those of the window that distances are parts of; None for ``window``.
        qkv_bias: queries and values have biases.
    """

    relative_coords_table: torch.Tensor

    def __init__(
        self, dim: int, block: Block, window: tuple[int, int], reference: tuple[int, int] | None, qkv_bias: bool
    ) -> None:
        super().__init__(dim, window, block.heads, qkv_bias=False, pretrained_window_size=reference or (0, 0))
        self.v_dims, width, total_v = block.v_widths, block.heads * block.qk, block.total_v
        del self.qkv
        self.q_proj = nn.Linear(dim, width, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, width, bias=False)
        self.v_proj = nn.Linear(dim, total_v, bias=qkv_bias)
        self.proj = nn.Linear(total_v, dim)

    @property
    def q_norm(self) -> Directions:
        """Gives a query's direction, times the factor of its head."""
        return Directions(lambda: self.logit_scale.clamp(max=LARGEST).exp())

    @property
    def k_norm(self) -> Directions:
        """Gives a key's direction."""
        return Directions()

    def _make_pair_wise_relative_positions(self, device: Any = None, dtype: Any = None) -> Any:
        return super()._make_pair_wise_relative_positions(device, torch.float32)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CosineWindowAttention:
        exact = self.relative_coords_table  # not rounded to less than float32, whatever the model's type
        super()._apply(fn, recurse)
        if self.relative_coords_table.dtype in (torch.float16, torch.bfloat16):
            self.relative_coords_table = exact.to(self.relative_coords_table.device)
        return self

    def _get_rel_pos_bias(self) -> torch.Tensor:
        """Compute what is added to the logits of all windows, (1, H, N, N)."""
        distances = self.relative_coords_table.to(self.cpb_mlp[0].weight.dtype)
        table = self.cpb_mlp(distances).flatten(0, 2)[self.relative_position_index.flatten()]
        bias = 16 * table.sigmoid()
        return rearrange(bias, "(n m) h -> 1 h n m", n=self.window_size[0] * self.window_size[1]).contiguous()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within windows, (windows*B, N, D) to the same; ``mask`` is (windows, N, N) or None."""
        q, k = (rearrange(part(x), "b n (h e) -> b h n e", h=self.num_heads) for part in (self.q_proj, self.k_proj))
        bias = self._get_rel_pos_bias()
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        q, k = self.q_norm(q), self.k_norm(k)
        found: torch.Tensor = self.proj(attend(q, k, self.v_proj(x), self.v_dims, 1.0, attn_mask=bias.to(q.dtype)))
        return found
