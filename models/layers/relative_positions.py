"""Attention over a map whose logits have terms for distances in rows and in columns, which queries read (MViTv2).

    y = softmax(scale * Q K^T + Q_(r,c) . R_rows[r - r'] + Q_(r,c) . R_columns[c - c']) V

of a query at row r and column c and a key at row r' and column c'; queries there are not scaled. Sources: MViTv2,
arXiv 2112.01526, equation 4, as ViTDet (arXiv 2203.16527) and Segment Anything (arXiv 2304.02643) have it.

Shapes: B batch, N = rows * columns tokens, D residual width, H heads, E query/key width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .mixers import HeteroAttention, attend

__all__ = ["RelativeAttention"]


class RelativeAttention(HeteroAttention):
    """Self-attention of any widths over a map, with tables of relative positions or without.

    ``rel_pos_h`` (2 rows - 1, H*E) and ``rel_pos_w`` (2 columns - 1, H*E) have columns of their own for every query
    channel, head after head, from the farthest place behind a query to the farthest one in front of it.
    """

    rel_pos_h: nn.Parameter | None
    rel_pos_w: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim: int,
        v_dims: Sequence[int],
        scale: float,
        *,
        grid: tuple[int, int],
        relative: bool,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, qk_dim, v_dims, scale, **options)
        self.grid = grid
        for name, side in zip(("rel_pos_h", "rel_pos_w"), grid, strict=True):
            table = nn.Parameter(torch.zeros(2 * side - 1, num_heads * qk_dim)) if relative else None
            self.register_parameter(name, table)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attend over the tokens of a map, (B, N, D) to the same."""
        width = self.num_heads * self.qk_dim
        q, k, v = self.qkv(x).split([width, width, self.attn_dim], dim=-1)
        q, k = (rearrange(t, "b n (h e) -> b h n e", h=self.num_heads) for t in (q, k))
        q, k = self.q_norm(q), self.k_norm(k)
        y = self.attend(q, k, v, self.v_dims, self.scale, attn_mask, is_causal=is_causal)
        found: torch.Tensor = self.proj(y)
        return found

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        v_dims: Sequence[int],
        scale: float,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Compute attention as ``models.layers.mixers.attend`` does, with the terms of relative positions."""
        bias = self.position_bias(q)
        if bias is not None:
            attn_mask = bias if attn_mask is None else bias + attn_mask
        return attend(q, k, v, v_dims, scale, attn_mask=attn_mask, **options)

    def position_bias(self, q: torch.Tensor) -> torch.Tensor | None:
        """Compute the terms (B, H, N, N) of queries (B, H, N, E), behind their norm; None without tables."""
        if self.rel_pos_h is None or self.rel_pos_w is None:
            return None
        rows, columns = self.grid
        own = rearrange(q, "b h (r c) e -> b h r c e", r=rows)
        by_row = rearrange(own, "b h r c e -> h r (b c) e") @ self._of_pairs(self.rel_pos_h, rows).to(q.dtype)
        by_column = rearrange(own, "b h r c e -> h c (b r) e") @ self._of_pairs(self.rel_pos_w, columns).to(q.dtype)
        by_row = rearrange(by_row, "h r (b c) k -> b h r c k 1", c=columns)
        bias = by_row + rearrange(by_column, "h c (b r) k -> b h r c 1 k", r=rows)
        return bias.flatten(4, 5).flatten(2, 3)

    def _of_pairs(self, table: torch.Tensor, side: int) -> torch.Tensor:
        """Look up the vectors of all pairs of a query's place and a key's, (H, side of queries, E, side of keys)."""
        places = torch.arange(side, device=table.device)
        return rearrange(table[places[:, None] - places + side - 1], "i j (h e) -> h i e j", h=self.num_heads)

    def resize(self, grid: tuple[int, int]) -> None:
        """Take maps of another size; tables are resampled linearly, as timm and ViTDet do."""
        for name, side in zip(("rel_pos_h", "rel_pos_w"), grid, strict=True):
            table = getattr(self, name)
            if table is not None and len(table) != 2 * side - 1:
                own = F.interpolate(table.detach().T[None], size=2 * side - 1, mode="linear")[0].T
                setattr(self, name, nn.Parameter(own.contiguous(), requires_grad=table.requires_grad))
        self.grid = grid
