"""Talking-heads attention (arXiv 2003.02436), as CaiT has it: logits and attention maps are mixed between heads.

Shapes: B batch, N tokens, D residual width, H heads, E query/key width of a head, V value channels of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from einops import rearrange
from torch import nn

from .mixers import HeteroAttention

__all__ = ["TalkingHeadsAttention"]


class TalkingHeadsAttention(HeteroAttention):
    """``HeteroAttention`` whose heads' logits are mixed by ``proj_l`` and attention maps by ``proj_w``, both H to H."""

    def __init__(self, dim: int, num_heads: int, qk_dim: int, v_dims: Sequence[int], scale: float, **options: Any):
        super().__init__(dim, num_heads, qk_dim, v_dims, scale, **options)
        self.proj_l, self.proj_w = nn.Linear(num_heads, num_heads), nn.Linear(num_heads, num_heads)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_dims: Sequence[int], scale: float, **_: Any
    ) -> torch.Tensor:
        """Compute y_h = A_h V_h with A = P_w softmax(P_l scale Q K^T), over queries (B, H, N, E) as ``mixers.attend``.

        Args:
            q: queries (B, H, N, E).
            k: keys (B, H, N, E).
            v: values (B, N, V), head after head.
            v_dims: value width of every head.
            scale: factor on the products of queries and keys.

        Returns:
            (B, N, V), head after head.
        """
        logits = self.proj_l(rearrange(scale * q @ k.mT, "b h n m -> b n m h"))
        maps = rearrange(self.proj_w(logits.softmax(2)), "b n m h -> b h n m")
        out, head, channel = [], 0, 0
        for width, run in groupby(v_dims):  # heads of one width side by side at once
            heads = len(list(run))
            own = rearrange(v[..., channel : channel + heads * width], "b m (h v) -> b h m v", h=heads)
            out.append(rearrange(maps[:, head : head + heads] @ own, "b h n v -> b n (h v)"))
            head, channel = head + heads, channel + heads * width
        return torch.cat(out, -1) if len(out) > 1 else out[0]

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attend over tokens, (B, N, D) to the same; masks are not for talking heads."""
        assert attn_mask is None
        assert not is_causal
        width = self.num_heads * self.qk_dim
        q, k, v = self.qkv(x).split([width, width, self.attn_dim], dim=-1)
        q, k = (rearrange(t, "b n (h e) -> b h n e", h=self.num_heads) for t in (q, k))
        found: torch.Tensor = self.proj(self.attend(q, k, v, self.v_dims, self.scale))
        return found
