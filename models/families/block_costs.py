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
    """Count the parameters of an attention's projections, with biases and q/k norms where the record has them.

        H E D + (H E + V) C + V D    weights of queries, of keys and values, and of the output

    Args:
        arch: the record, for biases, norms and channels of a query/key unit.
        stage: the block's stage; D is its width.
        block: the block.
        channels: C, channels that keys and values are read from.
    """
    qk, v, k_bias = block.heads * block.qk * arch.qk_rows, block.total_v, arch.qkv_bias and arch.k_bias
    params = qk * (stage.width + arch.qkv_bias) + qk * (channels + k_bias) + v * (channels + arch.qkv_bias)
    norms = arch.norm_tensors * (2 * block.qk * arch.qk_rows * arch.qk_norm + v * arch.attn_norm)
    return params + (v + arch.proj_bias) * stage.width + norms


def global_attention_cost(arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
    """Count MACs and parameters of attention of N tokens over the same N tokens.

        N (2 H E + 2 V) D    projections
        N N (H E + V)        products of queries with keys, and of the map with values

    Args:
        arch: the record.
        stage: the block's stage; D is its width.
        block: the block.
        tokens: N.
    """
    qk, v = block.heads * block.qk * arch.qk_rows, block.total_v
    macs = tokens * (stage.width + tokens) * (qk + v) + tokens * stage.width * (qk + v)
    return macs, projection_params(arch, stage, block, stage.width)


def convolution_cost(stage: Stage, block: Block) -> Counts:
    """Count MACs and parameters of SPViT's bottleneck convolution on the patches, with its BatchNorm.

    It is a k x k convolution from D to V and a 1 x 1 convolution back to D (arXiv 2111.11802): P (k k + 1) D V MACs
    on P patches.

    Args:
        stage: the block's stage; D is its width, P its places.
        block: the block; V is its bottleneck width.
    """
    taps, patches = block.conv_kernel**2, stage.grid[0] * stage.grid[1]
    macs = patches * stage.width * block.total_v * (taps + 1)
    return macs, (stage.width * (taps + 1) + 3) * block.total_v + stage.width


def mlp_cost(arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
    """Count MACs, 2 N D M or, gated, 3 N D M, and parameters of two linear layers and of a norm between.

    Args:
        arch: the record.
        stage: the block's stage; D is its width.
        block: the block; M is its MLP width.
        tokens: N.
    """
    inputs = 1 + arch.glu
    unit = (inputs + 1) * stage.width
    own = inputs * arch.mlp_bias + arch.norm_tensors * arch.mlp_norm
    outer = arch.mlp_bias + arch.norm_tensors * arch.mlp_entry_norm
    return tokens * block.mlp * unit, block.mlp * (unit + own) + stage.width * outer
