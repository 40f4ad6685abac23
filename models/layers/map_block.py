"""Blocks of Hiera and Segment Anything: attention within windows of a map or over all of it, a convolution, an MLP.

Maps are B x rows x columns x D, row by row as in the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, LayerScale, Mlp
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage

from .activations import ACTIVATIONS
from .mixers import ConvMixer, HeteroAttention

__all__ = ["MapBlock", "join_windows", "span", "split_windows"]


def span(stage: Stage, block: Block) -> tuple[int, int]:
    """Return the rows and columns that a block attends over: its stage's window, or the whole map."""
    return stage.grid if block.whole_map or stage.window is None else stage.window


def split_windows(x: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
    """Split a map (B, rows, columns, D), padded with zeros to whole windows, into these, (windows*B, N, D)."""
    if tuple(x.shape[1:3]) == tuple(window):
        return x.flatten(1, 2)
    h, w = window
    if x.shape[1] % h or x.shape[2] % w:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % w, 0, -x.shape[1] % h))
    return rearrange(x, "b (r h) (c w) d -> (b r c) (h w) d", h=h, w=w)


def join_windows(windows: torch.Tensor, window: Sequence[int], grid: Sequence[int]) -> torch.Tensor:
    """Put windows (windows*B, N, D) together to a map (B, rows, columns, D) of ``grid``, without what was padded."""
    if tuple(window) == tuple(grid):
        return rearrange(windows, "b (r c) d -> b r c d", r=grid[0])
    (rows, columns), (h, w) = grid, window
    r, c = -(-rows // h), -(-columns // w)
    x = rearrange(windows, "(b r c) (h w) d -> b (r h) (c w) d", h=h, r=r, c=c)
    return x if (r * h, c * w) == (rows, columns) else x[:, :rows, :columns]


class MapBlock(nn.Module):
    """A block of one record on maps: attention in windows, a convolution or no mixer; an MLP or none."""

    def __init__(self, arch: Arch, stage: Stage, block: Block, *, drop_path: float, norm_layer: Any) -> None:
        super().__init__()
        dim = stage.width

        def scale() -> nn.Module:
            return LayerScale(dim) if arch.layer_scale else nn.Identity()

        self.mixer, self.norm_residual, self.has_mlp = block.mixer, block.norm_residual, block.mlp > 0
        self.window_size, self.shift_size = span(stage, block), (0, 0)

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        if block.mixer != "none" or block.norm_residual:
            self.norm1, self.ls1, self.drop_path1 = norm_layer(dim), scale(), drop()
        if block.mixer == "attn":
            self.attn: nn.Module = self._attention(arch, dim, block, norm_layer)
        elif block.conv_kernel:
            self.attn = ConvMixer(dim, block.total_v, block.conv_kernel, stage.grid)
        if self.has_mlp:
            self.norm2, self.ls2, self.drop_path2 = norm_layer(dim), scale(), drop()
            self.mlp = Mlp(dim, block.mlp, act_layer=ACTIVATIONS[arch.act])

    def _attention(self, arch: Arch, dim: int, block: Block, norm_layer: Any) -> nn.Module:
        """Make the attention within windows of ``window_size``."""
        return HeteroAttention(dim, block.heads, block.qk, block.v_widths, block.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block on a map, (B, rows, columns, D) to the same."""
        if self.mixer != "none":
            x = x + self.drop_path1(self.ls1(self._attn(self.norm1(x))))
        elif self.norm_residual:
            x = x + self.drop_path1(self.ls1(self.norm1(x)))
        if self.has_mlp:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        """Mix places of a map as timm's Swin blocks do: all between the norm and what is added to the stream."""
        if self.mixer != "attn":  # a convolution
            return rearrange(self.attn(x.flatten(1, 2)), "b (r c) d -> b r c d", r=x.shape[1])
        return join_windows(self.attn(split_windows(x, self.window_size)), self.window_size, x.shape[1:3])
