"""XCiT (arXiv 2106.09681): attention between channels, convolutions of single channels, and class attention that norms.

The width of a head is the source's, however narrow the stream is; of heads every block has its own number.

Shapes: B batch, N patches, D residual width, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, LayerNorm, LayerScale, Mlp
from torch import nn

from prunesweep.models.arch import Arch, Block, ClassAttention

from .class_attention import ClassTokenAttention

__all__ = ["CrossCovarianceAttention", "CrossCovarianceBlock", "LocalPatchInteraction", "NormingClassPool"]


class CrossCovarianceAttention(nn.Module):
    """Attention of a head's channels over its channels: y = softmax(t q k^T) v, of q and k whose rows have length 1.

    Args:
        dim: D.
        num_heads: H.
        width: E.
        bias: queries, keys and values have biases.
    """

    def __init__(self, dim: int, num_heads: int, width: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * num_heads * width, bias=bias)
        self.proj = nn.Linear(num_heads * width, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix channels, (B, N, D) to the same."""
        q, k, v = rearrange(self.qkv(x), "b n (three h c) -> three b h c n", three=3, h=self.num_heads).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = F.scaled_dot_product_attention(q * self.temperature, k, v, scale=1.0)
        found: torch.Tensor = self.proj(rearrange(y, "b h c n -> b n (h c)"))
        return found


class LocalPatchInteraction(nn.Module):
    """Two 3x3 convolutions of single channels, with an activation and BatchNorm between."""

    def __init__(self, dim: int, grid: tuple[int, int], act_layer: type[nn.Module]) -> None:
        super().__init__()
        self.grid = grid
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.act, self.bn = act_layer(), nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix neighbours, (B, N, D) to the same."""
        x = rearrange(x, "b (r c) d -> b d r c", r=self.grid[0])
        return rearrange(self.conv2(self.bn(self.act(self.conv1(x)))), "b d r c -> b (r c) d")


class CrossCovarianceBlock(nn.Module):
    """Channels, neighbours and hidden units, each with a norm in front and factors behind."""

    def __init__(
        self, arch: Arch, block: Block, *, drop_path: float = 0.0, act_layer: Any = nn.GELU, norm_layer: Any = LayerNorm
    ) -> None:
        super().__init__()
        (stage,) = arch.stages
        dim = stage.width
        self.mixer, self.has_mlp = block.mixer, block.mlp > 0
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if self.mixer == "xca":
            self.norm1, self.norm3 = norm_layer(dim), norm_layer(dim)
            self.attn = CrossCovarianceAttention(dim, block.heads, block.qk, arch.qkv_bias)
            self.local_mp = LocalPatchInteraction(dim, stage.grid, act_layer)
            self.ls1, self.ls3 = LayerScale(dim), LayerScale(dim)
        if self.has_mlp:
            self.norm2, self.mlp = norm_layer(dim), Mlp(dim, block.mlp, act_layer=act_layer)
            self.ls2 = LayerScale(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block on patches, (B, N, D) to the same."""
        if self.mixer == "xca":
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
            x = x + self.drop_path(self.ls3(self.local_mp(self.norm3(x))))
        if self.has_mlp:
            x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x


class NormingClassBlock(nn.Module):
    """A block of a class token as XCiT has it: patches are changed, too, by norms and factors alone."""

    def __init__(self, dim: int, record: ClassAttention, bias: bool, act_layer: Any, norm_layer: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = ClassTokenAttention(dim, record.width, record.heads, bias)
        self.mlp = Mlp(dim, record.mlp, act_layer=act_layer)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.norm_patches = record.norm_patches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block on class token and patches, (B, 1 + N, D) to the same."""
        normed = self.norm1(x)
        x = x + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], 1)
        token = self.norm2(x) if self.norm_patches else self.norm2(x[:, :1])
        token, patches = token[:, :1], token[:, 1:] if self.norm_patches else x[:, 1:]
        return torch.cat([token + self.gamma2 * self.mlp(token), 2 * patches], 1)


class NormingClassPool(nn.Module):
    """A class token and its blocks, which pool patches (B, N, D) to (B, D); arguments are ClassAttentionPool's."""

    def __init__(
        self, dim: int, record: ClassAttention, *, bias: bool, act_layer: Any = nn.GELU, norm_layer: Any = LayerNorm
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        own = (NormingClassBlock(dim, record, bias, act_layer, norm_layer) for _ in range(record.blocks))
        self.blocks = nn.Sequential(*own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool patches."""
        found: torch.Tensor = self.blocks(torch.cat([self.cls_token.repeat(x.shape[0], 1, 1), x], 1))
        return found[:, 0]
