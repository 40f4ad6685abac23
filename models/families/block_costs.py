"""Cost of a record and of the usual halves of a block, by closed formula in integers.

Sources: NViT (arXiv 2110.04869) tables 1 and 7 for ViTs, UP-ViT (arXiv 2111.15127) for PVTv2, SPViT (arXiv 2111.11802)
for Swin and convolutions; tables of all of them are reproduced (``models.published``).

N tokens, D residual width, H heads, E query/key width of a head, V value channels of all heads, M MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunesweep.models.arch import Arch, Block, Stage

__all__ = ["Cost", "Counts", "convolution_cost", "global_attention_cost", "mlp_cost", "projection_params"]

Counts = tuple[int, int]  # MACs and parameters: sums inside a formula make no objects


@dataclass(frozen=True, slots=True)
class Cost:
    """``macs`` per image, or per word of a text, and ``params``, both exact integers."""

    macs: int
    params: int


def projection_params(arch: Arch, stage: Stage, block: Block, channels: int) -> int:
    """Parameters of an attention's projections; keys and values are read from ``channels`` channels."""
    qk, v = block.heads * block.qk, block.total_v
    params = qk * (stage.width + arch.qkv_bias) + (qk + v) * (channels + arch.qkv_bias) + (v + 1) * stage.width
    return params + 4 * block.qk * arch.qk_norm


def global_attention_cost(arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
    """Attention of N ``tokens`` over the same N: N (2 H E + 2 V) D for the projections, N N (H E + V) for the map."""
    qk, v = block.heads * block.qk, block.total_v
    macs = tokens * (stage.width + tokens) * (qk + v) + tokens * stage.width * (qk + v)
    return macs, projection_params(arch, stage, block, stage.width)


def convolution_cost(stage: Stage, block: Block) -> Counts:
    """SPViT's bottleneck convolution on the patches, with its BatchNorm: k x k from D to V, 1 x 1 back to D."""
    taps, patches = block.conv_kernel**2, stage.grid[0] * stage.grid[1]
    macs = patches * stage.width * block.total_v * (taps + 1)
    return macs, (stage.width * (taps + 1) + 3) * block.total_v + stage.width


def mlp_cost(stage: Stage, block: Block, tokens: int) -> Counts:
    """Two linear layers with biases: 2 N D M MACs."""
    return tokens * block.mlp * 2 * stage.width, block.mlp * (2 * stage.width + 1) + stage.width
