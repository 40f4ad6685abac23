"""Exact cost of a record by closed formula, without building anything.

1 MAC is one multiply-add of a convolution, a linear layer or one of attention's two matrix products; what
``torch.utils.flop_counter.FlopCounterMode`` counts, halved. Norms, softmax, activations and biases are not MACs.
Source: "Global Vision Transformer Pruning with Hessian-Aware Saliency" (NViT), tables 1 and 7 agree with these
formulas, as do timm's parameter counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arch import Arch, Block

__all__ = ["Cost", "block_macs", "cost", "stem_macs"]


@dataclass(frozen=True, slots=True)
class Cost:
    """``macs`` per image and ``params``, both exact integers."""

    macs: int
    params: int


def block_macs(tokens: int, width: Any, heads: Any, qk: Any, v: Any, mlp: Any) -> Any:
    """MACs of one ViT block on N tokens with equal heads; ints, or numpy arrays of equal shape.

    N·D·H(2E+V) for Q, K and V, N²·H(E+V) for attention, N·H·V·D for the projection, 2·N·D·M for the MLP. Ragged heads
    enter as ``heads=H, v=sum(V)/H``; a missing half has heads or mlp 0.
    """
    return tokens * width * heads * (2 * qk + 2 * v) + tokens**2 * heads * (qk + v) + 2 * tokens * width * mlp


def stem_macs(arch: Arch, width: Any) -> Any:
    """MACs outside the blocks, patch embedding and classifiers, at residual width D; all of it is linear in D."""
    rows, columns = arch.stages[0].grid
    pixels = arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
    return width * (rows * columns * pixels + (1 + arch.dist_token) * arch.num_classes)


def cost(arch: Arch) -> Cost:
    """MACs per image and parameters of ``build(arch)``."""
    (stage,) = arch.stages
    width, tokens = stage.width, arch.tokens
    macs, params = stem_macs(arch, width), _stem_params(arch, width)
    for block in stage.blocks:
        total_v = sum(block.v_widths)
        macs += block_macs(tokens, width, 1, block.heads * block.qk, total_v, block.mlp)
        params += _block_params(arch, block, width, total_v)
    return Cost(macs, params)


def _stem_params(arch: Arch, width: int) -> int:
    rows, columns = arch.stages[0].grid
    embed = width * arch.patch_size[0] * arch.patch_size[1] * arch.in_chans + (0 if arch.pre_norm else width)
    positions = rows * columns + (arch.prefix_tokens if arch.prefix_pos_embed else 0)
    norms = int(arch.head_norm != "none") + int(arch.pre_norm)
    heads = (1 + arch.dist_token) * (width * arch.num_classes + arch.num_classes)
    return embed + width * (arch.prefix_tokens + positions + 2 * norms) + heads


def _block_params(arch: Arch, block: Block, width: int, total_v: int) -> int:
    params = 0
    if block.mixer == "attn":
        rows = 2 * block.heads * block.qk + total_v
        params += rows * (width + arch.qkv_bias) + total_v * width + width
        params += 4 * block.qk * arch.qk_norm
        params += width * (2 + arch.layer_scale)
    if block.mlp:
        params += 2 * width * block.mlp + block.mlp + width
        params += width * (2 + arch.layer_scale)
    return params
