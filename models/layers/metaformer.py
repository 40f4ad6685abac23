"""MetaFormer's blocks (PoolFormer, arXiv 2111.11418; ConvFormer and CAFormer, arXiv 2210.13452) of any widths.

All of them work on tokens: a 1x1 convolution is a linear layer here, whatever timm has it as.

Shapes: B batch, N places, D residual width, V channels of a separable convolution or value channels of all heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, LayerScale, Mlp
from timm.models.metaformer import StarReLU
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage

from .activations import ACTIVATIONS
from .mixers import HeteroAttention

__all__ = ["ACTS", "KERNEL", "POOL", "MetaFormerBlock", "NeighbourPool", "SeparableConv", "TokenGroupNorm"]

KERNEL = 7  # side of a separable convolution's kernel
POOL = 3  # side of the square that pooling averages over
ACTS = {**ACTIVATIONS, "star_relu": StarReLU}  # s relu(x)^2 + b, with learned s and b


class TokenGroupNorm(nn.Module):
    """GroupNorm of one group: mean and variance are over all places and channels of an image.

    Args:
        dim: D.
        eps: added to the variance.
        bias: channels have a bias, not a gain alone.
    """

    def __init__(self, dim: int, eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise tokens, (B, N, D) to the same."""
        y = F.layer_norm(x, x.shape[1:], eps=self.eps) * self.weight
        return y if self.bias is None else y + self.bias


class NeighbourPool(nn.Module):
    """The average of a place's neighbours, those inside the map, less the place itself."""

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        """Mix places of a map of ``feat_size`` (rows, columns), (B, N, D) to the same."""
        image = rearrange(x, "b (h w) d -> b d h w", h=feat_size[0])
        pooled = F.avg_pool2d(image, POOL, stride=1, padding=POOL // 2, count_include_pad=False)
        return rearrange(pooled, "b d h w -> b (h w) d") - x


class SeparableConv(nn.Module):
    """A linear layer, StarReLU, a convolution of single channels and a linear layer: D -> V -> V -> D, no biases."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.pwconv1, self.act1 = nn.Linear(dim, channels, bias=False), StarReLU()
        self.dwconv = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels, bias=False)
        self.pwconv2 = nn.Linear(channels, dim, bias=False)

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        """Mix places of a map of ``feat_size`` (rows, columns), (B, N, D) to the same."""
        image = rearrange(self.act1(self.pwconv1(x)), "b (h w) v -> b v h w", h=feat_size[0])
        found: torch.Tensor = self.pwconv2(rearrange(self.dwconv(image), "b v h w -> b (h w) v"))
        return found


class MetaFormerAttention(HeteroAttention):
    """``HeteroAttention`` whose output projection may lack its bias."""

    def __init__(self, arch: Arch, dim: int, block: Block) -> None:
        super().__init__(dim, block.heads, block.qk, block.v_widths, block.scale, qkv_bias=arch.qkv_bias)
        self.proj = nn.Linear(self.attn_dim, dim, bias=arch.proj_bias)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Attend over all places, (B, N, D) to the same; rows and columns do not matter."""
        return super().forward(x)


class MetaFormerBlock(nn.Module):
    """A block of one record; either half may be missing, and only its factors on what passes by stay then."""

    def __init__(self, arch: Arch, stage: Stage, block: Block, *, drop_path: float = 0.0) -> None:
        super().__init__()
        dim = stage.width

        def norm() -> nn.Module:
            if arch.norm == "group":
                return TokenGroupNorm(dim, arch.norm_eps, bias=arch.norm_bias)
            return nn.LayerNorm(dim, eps=arch.norm_eps, bias=arch.norm_bias)

        def branch() -> tuple[nn.Module, nn.Module]:
            drop = DropPath(drop_path) if drop_path > 0 else nn.Identity()
            return drop, LayerScale(dim) if arch.layer_scale else nn.Identity()

        self.mixer, self.norm_residual, self.has_mlp = block.mixer, block.norm_residual, block.mlp > 0
        self.rs1, self.rs2 = (LayerScale(dim, init_values=1.0) if stage.res_scale else nn.Identity() for _ in "12")
        if block.mixer != "none" or block.norm_residual:
            self.norm1 = norm()
            self.drop_path1, self.ls1 = branch()
        if block.mixer == "attn":
            self.attn: nn.Module = MetaFormerAttention(arch, dim, block)
        elif block.mixer == "sepconv":
            self.attn = SeparableConv(dim, block.total_v)
        elif block.mixer == "pool":
            self.attn = NeighbourPool()
        if self.has_mlp:
            self.norm2, self.mlp = norm(), Mlp(dim, block.mlp, act_layer=ACTS[arch.act], bias=arch.mlp_bias)
            self.drop_path2, self.ls2 = branch()

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        """Run on a map of ``feat_size`` (rows, columns), (B, N, D) to the same."""
        passing = self.rs1(x)
        if self.mixer != "none":
            passing = passing + self.drop_path1(self.ls1(self.attn(self.norm1(x), feat_size)))
        elif self.norm_residual:
            passing = passing + self.drop_path1(self.ls1(self.norm1(x)))
        found: torch.Tensor = self.rs2(passing)
        if self.has_mlp:
            found = found + self.drop_path2(self.ls2(self.mlp(self.norm2(passing))))
        return found
