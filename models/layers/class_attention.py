"""Class attention (CaiT, arXiv 2103.17239): behind all other blocks, a class token reads patches in blocks of its own.

Shapes: B batch, N patches, D residual width, W width of attention, which is the source's however narrow D is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm, Mlp
from torch import nn

from prunesweep.models.arch import ClassAttention

__all__ = ["ClassAttentionBlock", "ClassAttentionPool", "ClassTokenAttention"]


class ClassTokenAttention(nn.Module):
    """Attention of the first token over all tokens."""

    def __init__(self, dim: int, width: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, width, bias=bias) for _ in range(3))
        self.proj = nn.Linear(width, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the first token reads, (B, 1 + N, D) to (B, 1, D)."""
        parts = self.q(x[:, :1]), self.k(x), self.v(x)
        q, k, v = (rearrange(part, "b n (h e) -> b h n e", h=self.num_heads) for part in parts)
        found: torch.Tensor = self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)"))
        return found


class ClassAttentionBlock(nn.Module):
    """A pre-norm block whose stream is the class token; its norm in front of attention is over patches, too."""

    def __init__(self, dim: int, record: ClassAttention, bias: bool, act_layer: Any, norm_layer: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = ClassTokenAttention(dim, record.width, record.heads, bias)
        self.mlp = Mlp(dim, record.mlp, act_layer=act_layer)

    def read(self, token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute what attention reads, (B, 1 + N, D), of the class token (B, 1, D) and patches (B, N, D)."""
        found: torch.Tensor = self.norm1(torch.cat([token, x], 1))
        return found

    def attended(self, token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute the class token behind the attention."""
        found: torch.Tensor = token + self.attn(self.read(token, x))
        return found

    def forward(self, token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute the class token behind the block."""
        token = self.attended(token, x)
        found: torch.Tensor = token + self.mlp(self.norm2(token))
        return found


class ClassAttentionPool(nn.Module):
    """A learned class token and its blocks, which pool patches (B, N, D) to (B, D).

    Args:
        dim: D.
        record: the blocks' record.
        bias: queries, keys and values have biases.
        act_layer: activation of hidden units.
        norm_layer: of all norms.
    """

    def __init__(
        self,
        dim: int,
        record: ClassAttention,
        *,
        bias: bool = True,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Any = LayerNorm,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        own = (ClassAttentionBlock(dim, record, bias, act_layer, norm_layer) for _ in range(record.blocks))
        self.blocks = nn.ModuleList(own)

    def token(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        """Compute the class token (B, 1, D) behind the first ``blocks`` blocks."""
        token = self.cls_token.repeat(x.shape[0], 1, 1)
        for block in self.blocks[:blocks]:
            token = block(token, x)
        return token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool patches."""
        return self.token(x, len(self.blocks))[:, 0]
