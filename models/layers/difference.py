"""Differential attention (arXiv 2410.05258): a head's attention map is the difference of two softmaxes.

    y_h = norm_h((softmax(s Q1_h K1_h^T) - lambda softmax(s Q2_h K2_h^T)) V_h)

All heads share lambda, and a head has a norm over its own values. A query/key unit is a pair of channels, one for each
map, laid out as pairs are in ``layers.rotary``: the first channels of all pairs, head after head, then the second ones.

Shapes: B batch, N tokens, D residual width, H heads, P pairs of a head, V value channels of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import nn

from .mixers import attend
from .rotary import RotaryAttention

__all__ = ["DifferentialAttention", "HeadNorm"]

EPS = 1e-5  # timm's, whatever that of other norms is


class HeadNorm(nn.Module):
    """An RMSNorm over the value channels of every head by itself, with a gain for every channel of all heads."""

    def __init__(self, v_dims: Sequence[int]) -> None:
        super().__init__()
        self.v_dims, self.eps = tuple(v_dims), EPS
        self.weight = nn.Parameter(torch.ones(sum(v_dims)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., V), head after head, to the same shape."""
        if len(set(self.v_dims)) == 1:
            heads = rearrange(x, "... (h v) -> ... h v", h=len(self.v_dims))
            return self._standardised(heads).flatten(-2) * self.weight
        return torch.cat([self._standardised(y) for y in torch.split(x, list(self.v_dims), -1)], -1) * self.weight

    def _standardised(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class DifferentialAttention(RotaryAttention):
    """Self-attention of any widths whose maps are differences of two; ``lambda_full`` is the paper's lambda.

    ``q_proj`` and ``k_proj`` have 2 H P rows, ``norm`` is a ``HeadNorm``.
    """

    def __init__(
        self, dim: int, num_heads: int, qk_dim: int, v_dims: Sequence[int], scale: float, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, 2 * qk_dim, v_dims, scale, None, **options)
        self.qk_dim = qk_dim
        self.norm = HeadNorm(v_dims)
        self.lambda_full = nn.Parameter(torch.tensor(0.5))

    def by_head(self, q: torch.Tensor) -> torch.Tensor:
        """Reshape queries or keys (B, N, 2 H P) to (B, H, N, 2 P)."""
        return rearrange(q, "b n (two h p) -> b h n (two p)", two=2, h=self.num_heads)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_dims: Sequence[int], scale: float, **options: Any
    ) -> torch.Tensor:
        """Compute the difference of what two maps give, before the norm; as ``mixers.attend``.

        Args:
            q: queries (B, H, N, 2 P).
            k: keys (B, H, N, 2 P).
            v: values (B, N, V), head after head.
            v_dims: value width of every head.
            scale: factor on the products of queries and keys.
            options: those of ``scaled_dot_product_attention``.

        Returns:
            (B, N, V), head after head.
        """
        maps = zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        first, second = (attend(own_q, own_k, v, v_dims, scale, **options) for own_q, own_k in maps)
        return first - self.lambda_full.to(v.dtype) * second

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        coordinates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over tokens, (B, N, D) to the same; nothing is turned by ``coordinates``."""
        q, k, v = self.by_head(self.q_proj(x)), self.by_head(self.k_proj(x)), self.v_proj(x)
        y = self.attend(q, k, v, self.v_dims, self.scale, attn_mask=attn_mask, is_causal=is_causal)
        found: torch.Tensor = self.proj(self.norm(y))
        return found
