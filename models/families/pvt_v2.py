"""PVTv2 with a shape of its own in every block: timm's skeleton, stage norms and MLP, and attention of any widths."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath, LayerNorm, calculate_drop_path_rates
from timm.models.pvt_v2 import Block as TimmBlock
from timm.models.pvt_v2 import MlpWithDepthwiseConv, PyramidVisionTransformerV2
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.layers.mixers import ConvMixer, attend

__all__ = ["HeteroPvtBlock", "ReducedAttention", "build_pvt_v2"]


class ReducedAttention(nn.Module):
    """PVTv2's attention, keys and values read from a spatially reduced map, with any widths.

    ``q`` maps D to H*E; ``sr`` (where the stage reduces) maps the grid to R channels on M places; ``kv`` maps R (or D)
    to K (H*E) and V (sum of the heads' widths), each head after head.
    """

    def __init__(self, arch: Arch, stage: Stage, block: Block) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dims, self.scale = block.heads, block.qk, block.v_widths, block.scale
        width, bias = block.heads * block.qk, arch.qkv_bias
        self.q = nn.Linear(stage.width, width, bias=bias)
        self.kv = nn.Linear(block.sr or stage.width, width + block.total_v, bias=bias)
        self.sr = self.norm = None
        if block.sr:
            self.sr = nn.Conv2d(stage.width, block.sr, stage.sr_ratio, stride=stage.sr_ratio)
            self.norm = nn.LayerNorm(block.sr)
        self.proj = nn.Linear(block.total_v, stage.width)

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        """Attend on a map of ``feat_size`` (rows, columns), (B, N, D) to the same."""
        q = self.q(x)
        if self.sr is not None and self.norm is not None:
            reduced = self.sr(rearrange(x, "b (h w) d -> b d h w", h=feat_size[0]))
            x = self.norm(rearrange(reduced, "b r h w -> b (h w) r"))
        k, v = self.kv(x).split([self.num_heads * self.qk_dim, sum(self.v_dims)], dim=-1)
        q, k = (rearrange(t, "b n (h e) -> b h n e", h=self.num_heads) for t in (q, k))
        return self.proj(attend(q, k, v, self.v_dims, self.scale))


class HeteroPvtBlock(nn.Module):
    """PVTv2 block of one record; either half may be missing. Parameter names are timm's."""

    def __init__(self, arch: Arch, stage: Stage, block: Block, *, drop_path: float, norm_layer: Any) -> None:
        super().__init__()

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.mixer, self.norm_residual, self.has_mlp = block.mixer, block.norm_residual, block.mlp > 0
        if block.mixer != "none" or block.norm_residual:
            self.norm1, self.drop_path1 = norm_layer(stage.width), drop()
        if block.mixer == "attn":
            self.attn: nn.Module = ReducedAttention(arch, stage, block)
        elif block.conv_kernel:
            self.attn = ConvMixer(stage.width, block.total_v, block.conv_kernel, stage.grid)
        if self.has_mlp:
            self.norm2, self.drop_path2 = norm_layer(stage.width), drop()
            self.mlp = MlpWithDepthwiseConv(stage.width, block.mlp)

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        """Run on a map of ``feat_size`` (rows, columns), (B, N, D) to the same."""
        if self.mixer == "attn":
            x = x + self.drop_path1(self.attn(self.norm1(x), feat_size))
        elif self.mixer != "none":
            x = x + self.drop_path1(self.attn(self.norm1(x)))
        elif self.norm_residual:
            x = x + self.drop_path1(self.norm1(x))
        if self.has_mlp:
            x = x + self.drop_path2(self.mlp(self.norm2(x), feat_size))
        return x


def build_pvt_v2(arch: Arch, *, drop_path: float = 0.0) -> PyramidVisionTransformerV2:
    """A timm PyramidVisionTransformerV2 with the blocks of ``arch``."""
    norm_layer = partial(LayerNorm, eps=arch.norm_eps)
    model = PyramidVisionTransformerV2(
        in_chans=arch.in_chans,
        num_classes=arch.num_classes,
        depths=(0,) * len(arch.stages),
        embed_dims=[stage.width for stage in arch.stages],
        num_heads=1,
        sr_ratios=1,
        mlp_ratios=1.0,
        norm_layer=norm_layer,
    )
    rates = calculate_drop_path_rates(drop_path, [len(stage.blocks) for stage in arch.stages], stagewise=True)
    for stage, layer, own in zip(arch.stages, model.stages, rates, strict=True):
        pairs = zip(stage.blocks, own, strict=True)
        layer.blocks = nn.ModuleList(_block(arch, stage, block, rate, norm_layer) for block, rate in pairs)
    model.depths = tuple(len(stage.blocks) for stage in arch.stages)
    model.stages.apply(model._init_weights)
    return model


def _block(arch: Arch, stage: Stage, block: Block, drop_path: float, norm_layer: Any) -> nn.Module:
    reduced = stage.width if stage.sr_ratio > 1 else 0
    if not (block.stock_heads and block.mlp and block.heads * block.qk == stage.width and block.sr == reduced):
        return HeteroPvtBlock(arch, stage, block, drop_path=drop_path, norm_layer=norm_layer)
    return TimmBlock(
        stage.width,
        num_heads=block.heads,
        mlp_ratio=(block.mlp + 0.5) / stage.width,  # timm rounds width * ratio down
        sr_ratio=stage.sr_ratio,
        qkv_bias=arch.qkv_bias,
        drop_path=drop_path,
        norm_layer=norm_layer,
    )
