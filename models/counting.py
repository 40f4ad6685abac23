"""Exact cost of a record by closed formula, without building anything.

1 MAC is one multiply-add of a convolution, a linear layer or a matrix product; what
``torch.utils.flop_counter.FlopCounterMode`` counts, halved. Norms, softmax, activations, biases and the sums of a
sparse token plan are not MACs. A text's are those of one word: every word attends to a whole context and is predicted
by the whole softmax. Parameters are what ``sum(p.numel())`` counts; buffers are not parameters.

Sources of the formulas: NViT (arXiv 2110.04869) tables 1 and 7 for ViTs, UP-ViT (arXiv 2111.15127) for PVTv2, SPViT
(arXiv 2111.11802) for Swin and convolutions; tables of all of them are reproduced (``models.published``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .arch import Arch, Block, Stage

__all__ = ["Cost", "block_cost", "cost", "outside_cost"]


@dataclass(frozen=True, slots=True)
class Cost:
    """``macs`` per image, or per word of a text, and ``params``, both exact integers."""

    macs: int
    params: int


def cost(arch: Arch) -> Cost:
    """MACs per image (of a language model, per word) and parameters of ``build(arch)``."""
    macs, params = _OUTSIDE[arch.family](arch)
    for stage in arch.stages:
        for block in stage.blocks:
            block_macs, block_params = _block(arch, stage, block)
            macs += block_macs
            params += block_params
    return Cost(macs, params)


def block_cost(arch: Arch, stage: Stage, block: Block) -> Cost:
    """What one block adds in a stage of a model like ``arch``."""
    return Cost(*_block(arch, stage, block))


def outside_cost(arch: Arch) -> Cost:
    """All but the blocks: embedding, what lies between stages, norms and classifiers."""
    return Cost(*_OUTSIDE[arch.family](arch))


def _vit_outside(arch: Arch) -> tuple[int, int]:
    (stage,) = arch.stages
    width, patches = stage.width, stage.grid[0] * stage.grid[1]
    pixels = arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
    macs = width * (patches * pixels + (1 + arch.dist_token) * arch.num_classes)
    embed = width * pixels + (0 if arch.pre_norm else width)
    positions = patches + (arch.prefix_tokens if arch.prefix_pos_embed else 0)
    norms = (arch.head_norm != "none") + arch.pre_norm
    heads = (1 + arch.dist_token) * (width + 1) * arch.num_classes
    return macs, embed + width * (arch.prefix_tokens + positions + 2 * norms) + heads


def _swin_outside(arch: Arch) -> tuple[int, int]:
    """Patch embedding with a norm, patch merging (norm and reduction over 4 neighbours), norm and classifier."""
    first, last = arch.stages[0], arch.stages[-1]
    pixels = arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
    macs = first.grid[0] * first.grid[1] * pixels * first.width + last.width * arch.num_classes
    params = first.width * (pixels + 3) + last.width * 2 + (last.width + 1) * arch.num_classes
    for before, stage in zip(arch.stages, arch.stages[1:], strict=False):
        macs += stage.grid[0] * stage.grid[1] * 4 * before.width * stage.width
        params += 8 * before.width + 4 * before.width * stage.width
    return macs, params


def _pvt_outside(arch: Arch) -> tuple[int, int]:
    """Overlapping patch embeddings (7x7, then 3x3) with a norm each, a norm per stage, classifier."""
    last = arch.stages[-1]
    macs, params = last.width * arch.num_classes, (last.width + 1) * arch.num_classes
    channels, kernel = arch.in_chans, 49
    for stage in arch.stages:
        macs += stage.grid[0] * stage.grid[1] * stage.width * channels * kernel
        params += stage.width * (channels * kernel + 5)
        channels, kernel = stage.width, 9
    return macs, params


def _lm_outside(arch: Arch) -> tuple[int, int]:
    """Tables and projections of all bands, clusters; the softmax shares what is tied."""
    (stage,), text = arch.stages, arch.text
    assert text is not None
    width, tails = stage.width, sum(text.tails)
    vectors = [len(band) * own for band, own in zip(arch.bands, (width, *text.tails), strict=True)]
    projections, clusters = width * (width + tails), width * len(text.tails)
    macs = projections + clusters + sum(vectors) + width * tails
    own = width * tails * (text.tied != "all") + sum(vectors) * (text.tied == "none")
    return macs, sum(vectors) + projections + clusters + own


_OUTSIDE = {"vit": _vit_outside, "swin": _swin_outside, "pvt_v2": _pvt_outside, "lm": _lm_outside}


def _block(arch: Arch, stage: Stage, block: Block) -> tuple[int, int]:
    """MACs and parameters of one block."""
    width, patches = stage.width, stage.grid[0] * stage.grid[1]
    places = patches + arch.prefix_tokens  # between blocks
    tokens = block.tokens or places  # inside
    norm = width * (2 + arch.layer_scale)
    macs = params = 0
    if block.tokens is not None:
        dense = block.merge == "dense"
        macs += dense * 2 * tokens * places * width
        params += 2 * places * (tokens if dense else 1)
    if block.mixer == "attn":
        macs, params = macs + _attention_macs(stage, block, tokens), params + _attention_params(arch, stage, block)
    elif block.conv_kernel:
        taps = block.conv_kernel**2
        macs += patches * width * block.total_v * (taps + 1)
        params += (width * (taps + 1) + 3) * block.total_v + width
    if block.mixer != "none" or block.norm_residual:
        params += norm
    if block.mlp:
        depthwise = arch.family == "pvt_v2"
        macs += tokens * block.mlp * (2 * width + 9 * depthwise)
        params += block.mlp * (2 * width + 1 + 10 * depthwise) + width + norm
    return (macs // places if arch.text else macs), params


def _attention_macs(stage: Stage, block: Block, tokens: int) -> int:
    """Queries from all places; keys and values from all, the window's, or the reduced map's."""
    qk, v = block.heads * block.qk, block.total_v
    queries, read_from, channels, keys, macs = tokens, tokens, stage.width, tokens, 0
    if stage.window is not None:  # the map is padded to whole windows
        keys = math.prod(stage.window)
        windows = math.prod(-(-side // w) for side, w in zip(stage.grid, stage.window, strict=True))
        queries = read_from = windows * keys
    elif block.sr:
        keys = read_from = math.prod(side // stage.sr_ratio for side in stage.grid)
        channels = block.sr
        macs = read_from * stage.width * block.sr * stage.sr_ratio**2
    return macs + queries * (stage.width + keys) * (qk + v) + read_from * channels * (qk + v)


def _attention_params(arch: Arch, stage: Stage, block: Block) -> int:
    qk, v = block.heads * block.qk, block.total_v
    channels = block.sr or stage.width
    params = qk * (stage.width + arch.qkv_bias) + (qk + v) * (channels + arch.qkv_bias) + (v + 1) * stage.width
    params += 4 * block.qk * arch.qk_norm
    if block.sr:
        params += block.sr * (stage.width * stage.sr_ratio**2 + 3)
    if stage.window is not None:
        params += block.heads * math.prod(2 * w - 1 for w in stage.window)
    return params
