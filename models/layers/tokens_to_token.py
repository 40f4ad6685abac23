"""T2T-ViT's tokens-to-token module (arXiv 2101.11986): overlapping patches, and attention of one head between them.

An image is unfolded into patches of 2 s - 1 pixels at strides of s, attention makes a narrow token of each, and the map
of tokens is unfolded again. Attention is that of a Performer (positive random features, arXiv 2009.14794) or softmax
attention; either one adds its result to the values, which have the width of the result.

The dropout of 0.1 that the original trains its Performers with is left out.

Shapes: B batch, N patches, F numbers in a patch, E width of a token, M = E / 2 random features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

__all__ = ["KINDS", "TokenPerformer", "TokenTransformer", "TokensToToken", "kernel", "sinusoids"]

EPS = 1e-8  # of a Performer's denominator


def kernel(stride: int) -> int:
    """Return the side of the patches of a stride: 7 of 4, 3 of 2."""
    return 2 * stride - 1


class TokenPerformer(nn.Module):
    """Attention in linear time, and an MLP, (B, N, F) to (B, N, E); the random features ``w`` (M, E) are not trained.

        y = phi(q) (phi(k)^T v) / (phi(q) sum_n phi(k_n)),    phi(x) = exp(w x - |x|^2 / 2) / sqrt(M)

    Rows of ``kqv`` are those of keys, queries and values.
    """

    w: torch.Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(width)
        self.kqv, self.proj = nn.Linear(features, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        w = torch.empty(width // 2, width)
        if not w.is_meta:
            nn.init.orthogonal_(w)
        self.register_buffer("w", w * math.sqrt(len(w)))

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x @ self.w.mT - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(self.w))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over patches."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self._features(k), self._features(q)
        total = q @ k.sum(1).unsqueeze(2)  # (B, N, 1)
        x = v + self.proj(q @ (k.mT @ v) / (total + EPS))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class TokenAttention(nn.Module):
    """Softmax attention of one head, whose values are added to its result; logits are scaled by F ** -0.5."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(features, 3 * width, bias=False), nn.Linear(width, width)
        self.scale = features**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over patches."""
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # one head
        found: torch.Tensor = (v + self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale))).squeeze(1)
        return found


class TokenTransformer(nn.Module):
    """Softmax attention and an MLP, (B, N, F) to (B, N, E)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(width)
        self.attn = TokenAttention(features, width)
        self.mlp = Mlp(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over patches."""
        x = self.attn(self.norm1(x))
        found: torch.Tensor = x + self.mlp(self.norm2(x))
        return found


KINDS = {"t2t_performer": TokenPerformer, "t2t_transformer": TokenTransformer}


class TokensToToken(nn.Module):
    """Unfolds images into patches, with attention between one unfolding and the next.

    Args:
        kind: of attention, a key of ``KINDS``.
        in_chans: channels of images.
        widths: of the tokens behind every unfolding but the last.
        strides: of the unfoldings.
    """

    def __init__(self, kind: str, in_chans: int, widths: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        before = (in_chans, *widths)
        sizes = zip(before, strides, widths, strict=False)  # no attention behind the last unfolding
        self.attention = nn.ModuleList(KINDS[kind](c * kernel(stride) ** 2, width) for c, stride, width in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn images (B, C, rows, columns) into a map (B, F, rows, columns) of the last patches."""
        for i, stride in enumerate(self.strides):
            rows, columns = x.shape[2] // stride, x.shape[3] // stride
            patches = F.unfold(x, kernel(stride), padding=stride // 2, stride=stride)
            if i < len(self.attention):
                patches = self.attention[i](patches.mT).mT
            x = patches.reshape(*patches.shape[:2], rows, columns)
        return x


def sinusoids(places: int, width: int) -> torch.Tensor:
    """Compute positions (1, places, width) that are not learned (arXiv 1706.03762, section 3.5).

    Channels 2 i and 2 i + 1 are sine and cosine of place / 10000 ** (2 i / width).
    """
    channels = torch.arange(width, dtype=torch.float64)
    angles = torch.arange(places, dtype=torch.float64)[:, None] / 10000 ** (2 * (channels // 2) / width)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos())[None].to(torch.get_default_dtype())
