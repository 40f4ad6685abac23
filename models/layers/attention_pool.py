"""Attention pooling: one learned query attends to all tokens, and an MLP follows (SigLIP, arXiv 2303.15343)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm, Mlp, trunc_normal_tf_
from torch import nn

__all__ = ["LatentAttentionPool"]


class LatentAttentionPool(nn.Module):
    """timm's ``AttentionPoolLatent`` whose tokens may be narrower than what it gives; names of parameters are timm's.

    Shapes: B batch, N tokens, D their width, W that of the pool.

    Args:
        dim: D.
        width: W, of query, keys, values and output.
        num_heads: that W is divided into.
        hidden: units of its MLP.
        act_layer: their activation.
        norm_layer: of the norm in front of the MLP.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Any = LayerNorm,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        trunc_normal_tf_(self.latent, std=width**-0.5)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(dim, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = norm_layer(width)
        self.mlp = Mlp(width, hidden, act_layer=act_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute pooled features, (B, N, D) to (B, W)."""
        q = rearrange(self.q(self.latent), "one l (h e) -> one h l e", h=self.num_heads).expand(x.shape[0], -1, -1, -1)
        k, v = rearrange(self.kv(x), "b n (two h e) -> two b h n e", two=2, h=self.num_heads).unbind(0)
        y = self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l e -> b l (h e)"))
        found: torch.Tensor = (y + self.mlp(self.norm(y)))[:, 0]
        return found
