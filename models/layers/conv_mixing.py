"""SPViT's weight sharing: a convolution whose weights are mixtures of an attention layer's value and output weights.

Every tap of the kernel has a column of ``head_probs``; a softmax over the heads gives the tap's mixture P, and the
tap's weights are the same mixture of the heads' value weights. The result is the bottleneck convolution of
``models.layers.mixers.ConvMixer`` without its BatchNorm (arXiv 2111.11802, section 3.2, and the released code).
Everything is differentiable, so that the shared weights and ``head_probs`` can be trained through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange

__all__ = ["ConvSharing", "MixedConv", "mix_conv", "tap_columns"]


@dataclass(frozen=True, slots=True)
class ConvSharing:
    """The way in which a family's convolutions take their weights from its attention."""

    alpha: float  # temperature of the softmax over the heads
    centre_first: bool = False  # the kernel's centre has the first column of ``head_probs``

    def columns(self, kernel: int) -> torch.Tensor:
        """Return the column of ``head_probs`` of every tap; see ``tap_columns``."""
        return tap_columns(kernel, centre_first=self.centre_first)


class MixedConv(NamedTuple):
    """A k x k convolution D -> d and the 1x1 convolution d -> D behind it (BatchNorm and ReLU stand between them)."""

    weight: torch.Tensor  # (d, D, k, k)
    bias: torch.Tensor  # (d,)
    out_weight: torch.Tensor  # (D, d, 1, 1)
    out_bias: torch.Tensor  # (D,)


def tap_columns(kernel: int, *, centre_first: bool = False) -> torch.Tensor:
    """Give the column of ``head_probs`` of every tap (row, column) of a 1x1 or 3x3 kernel.

    Taps are counted down the columns of the kernel. SPViT's DeiT takes them as they come, so that the centre is column
    4; its Swin puts the centre first. A 1x1 convolution is the centre alone.

    Args:
        kernel: side of the kernel, 1 or 3.
        centre_first: number the centre 0 and the taps before it one higher, as Swin does.

    Returns:
        Column numbers (kernel, kernel), int64.
    """
    taps = torch.arange(9).reshape(3, 3).T
    if centre_first:
        taps = torch.where(taps == 4, 0, taps + (taps < 4))
    return taps if kernel == 3 else taps[1:2, 1:2]


def mix_conv(
    head_probs: torch.Tensor,
    v_weight: torch.Tensor,
    v_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    *,
    columns: torch.Tensor,
    alpha: float,
) -> MixedConv:
    """Mix the weights of the convolution that shares those of an attention layer with H heads of width d.

    Args:
        head_probs: (H, 9), before the softmax.
        v_weight, v_bias: (H*d, D) and (H*d,), the value projection, head after head.
        proj_weight, proj_bias: (D, H*d) and (D,), the output projection.
        columns: the kernel's taps, ``ConvSharing.columns(kernel)``.
        alpha: temperature of the softmax over the heads.
    """
    heads = head_probs.shape[0]
    share = (head_probs / alpha).softmax(0)[:, columns]  # P: (H, k, k), sums to 1 over the heads
    weight = torch.einsum("hyx,hdi->diyx", share, rearrange(v_weight, "(h d) i -> h d i", h=heads))
    bias = torch.einsum("hyx,hd->d", share, rearrange(v_bias, "(h d) -> h d", h=heads))
    out = torch.einsum("hyx,ohd->od", share, rearrange(proj_weight, "o (h d) -> o h d", h=heads))
    return MixedConv(weight, bias, out[..., None, None], proj_bias)
