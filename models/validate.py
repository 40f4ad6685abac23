"""What makes a record impossible to build; every message names the field, what it holds and what is allowed."""

from __future__ import annotations

from typing import Any

from .arch import Arch, Block, Stage, Text
from .errors import UserError, nearest

__all__ = ["FAMILIES", "MIXERS", "validate"]

FAMILIES = ("vit", "swin", "pvt_v2", "lm")
MIXERS = ("attn", "conv1x1", "conv3x3", "none")
POOLS = ("token", "avg", "none")
HEAD_NORMS = ("tokens", "pooled", "none")
MERGES = ("sparse", "dense")
TIED = ("all", "tables", "none")
ACTIVATIONS = ("relu", "gelu")  # of a language model

# What timm's VisionTransformerDistilled, the two pyramids and a language model take for granted.
DISTILLED = {"class_token": True, "reg_tokens": 0, "prefix_pos_embed": True, "pool": "token", "head_norm": "tokens"}
PYRAMID = {
    "class_token": False,
    "dist_token": False,
    "reg_tokens": 0,
    "pool": "avg",
    "head_norm": "tokens",
    "pre_norm": False,
    "qk_norm": False,
    "layer_scale": False,
}
LANGUAGE_MODEL = PYRAMID | {"pool": "none", "head_norm": "none", "in_chans": 1, "patch_size": (1, 1)}


def validate(arch: Arch) -> None:
    """Raise UserError naming the first field that makes ``arch`` impossible to build."""
    _one_of("family", arch.family, FAMILIES)
    _one_of("pool", arch.pool, POOLS)
    _one_of("head_norm", arch.head_norm, HEAD_NORMS)
    for name in ("in_chans", "num_classes"):
        _at_least(name, getattr(arch, name), 1)
    _at_least("reg_tokens", arch.reg_tokens, 0)
    for i, (image, patch) in enumerate(zip(arch.img_size, arch.patch_size, strict=True)):
        _at_least(f"patch_size[{i}]", patch, 1)
        if image < patch:
            raise UserError(f"img_size[{i}] = {image}: must be at least patch_size[{i}] = {patch}")
    if arch.family != "vit":
        _require(arch, f"family = {arch.family!r}", LANGUAGE_MODEL if arch.family == "lm" else PYRAMID)
    elif arch.pool == "none":
        raise UserError("pool = 'none': is for family 'lm' only; use 'token' or 'avg'")
    elif arch.pool == "token" and not arch.class_token:
        raise UserError("pool = 'token': needs class_token = true; use pool = 'avg'")
    if arch.dist_token:
        _require(arch, "dist_token = true", DISTILLED)
    if arch.family == "pvt_v2" and arch.patch_size != (4, 4):
        raise UserError(f"patch_size = {list(arch.patch_size)}: the patch embedding of pvt_v2 has stride [4, 4]")
    _validate_stages(arch)
    _validate_text(arch)


def _require(arch: Arch, why: str, needed: dict[str, Any]) -> None:
    for name, value in needed.items():
        if getattr(arch, name) != value:
            raise UserError(f"{why}: needs {name} = {value!r}, got {getattr(arch, name)!r}")


def _validate_stages(arch: Arch) -> None:
    one = arch.family in ("vit", "lm")
    if not arch.stages or (one and len(arch.stages) != 1):
        number = "exactly one stage" if one else "at least one stage"
        raise UserError(f"stages: a {arch.family} has {number}, got {len(arch.stages)}")
    for s, (stage, grid) in enumerate(zip(arch.stages, expected_grids(arch), strict=True)):
        where = f"stages[{s}]"
        _at_least(f"{where}.width", stage.width, 1)
        if stage.grid != grid:
            raise UserError(f"{where}.grid = {list(stage.grid)}: img_size / patch_size gives {list(grid)}")
        if not stage.blocks:
            raise UserError(f"{where}.blocks is empty: at least one block must be kept")
        _validate_stage(arch, stage, where)
        for b, block in enumerate(stage.blocks):
            _validate_block(arch, stage, block, f"{where}.blocks[{b}]")


def expected_grids(arch: Arch) -> list[tuple[int, ...]]:
    """Rows and columns of every stage: patches, halved (rounding up) from stage to stage.

    PVTv2 embeds with a 7x7 convolution of stride 4 and padding 3, which rounds up too.
    """
    up = arch.family == "pvt_v2"
    grids = [tuple((i + (p - 1 if up else 0)) // p for i, p in zip(arch.img_size, arch.patch_size, strict=True))]
    for _ in arch.stages[1:]:
        grids.append(tuple((side + 1) // 2 for side in grids[-1]))
    return grids


def _validate_stage(arch: Arch, stage: Stage, where: str) -> None:
    if (stage.window is None) == (arch.family == "swin"):
        needs = "needs the size of its attention windows" if arch.family == "swin" else "is for family 'swin' only"
        raise UserError(f"{where}.window = {stage.window!r}: {needs}")
    for i, side in enumerate(stage.window or ()):
        if not 1 <= side <= stage.grid[i]:
            raise UserError(f"{where}.window[{i}] = {side}: must lie in 1..{stage.grid[i]}, the grid's side")
    _at_least(f"{where}.sr_ratio", stage.sr_ratio, 1)
    if stage.sr_ratio > 1 and (arch.family != "pvt_v2" or stage.sr_ratio > min(stage.grid)):
        limit = f"must not exceed the grid {list(stage.grid)}" if arch.family == "pvt_v2" else "is for 'pvt_v2' only"
        raise UserError(f"{where}.sr_ratio = {stage.sr_ratio}: {limit}")


def _validate_block(arch: Arch, stage: Stage, block: Block, where: str) -> None:
    _one_of(f"{where}.mixer", block.mixer, MIXERS)
    _one_of(f"{where}.merge", block.merge, MERGES)
    _at_least(f"{where}.src", block.src, 0)
    _at_least(f"{where}.mlp", block.mlp, 0)
    if block.mixer == "attn":
        _validate_attention(block, where)
    else:
        _validate_other_mixer(block, where)
    _validate_extras(arch, stage, block, where)
    if block.tokens is not None:
        _validate_tokens(arch, block, where)


def _validate_attention(block: Block, where: str) -> None:
    _at_least(f"{where}.heads", block.heads, 1)
    _at_least(f"{where}.qk", block.qk, 1)
    if len(block.v_widths) != block.heads:
        raise UserError(f"{where}.v has {len(block.v_widths)} widths for {block.heads} heads: give one per head")
    for head, width in enumerate(block.v_widths):
        _at_least(f"{where}.v[{head}]", width, 1)
    if not isinstance(block.scale, float) or not block.scale > 0:
        raise UserError(f"{where}.scale = {block.scale!r}: must be a positive float (the source's E ** -0.5)")


def _validate_other_mixer(block: Block, where: str) -> None:
    if (block.heads, block.qk, block.scale) != (0, 0, 0.0):
        raise UserError(f"{where}: heads, qk and scale must be 0 where mixer is {block.mixer!r}")
    if block.mixer == "none":
        if block.v != 0:
            raise UserError(f"{where}.v = {block.v!r}: must be 0 where mixer is 'none'")
    else:
        _at_least(f"{where}.v", block.v, 1)


def _validate_extras(arch: Arch, stage: Stage, block: Block, where: str) -> None:
    """Fields that only one family or one mixer has."""
    reduced = stage.sr_ratio > 1 and block.mixer == "attn"
    _at_least(f"{where}.sr", block.sr, int(reduced))
    if block.sr and not reduced:
        raise UserError(f"{where}.sr = {block.sr}: must be 0 without attention on a spatially reduced map")
    if block.shifted and (arch.family != "swin" or block.mixer != "attn"):
        raise UserError(f"{where}.shifted: is for attention in the windows of family 'swin' only")
    if block.norm_residual and block.mixer != "none":
        raise UserError(f"{where}.norm_residual: is for mixer 'none' only, got {block.mixer!r}")
    if block.conv_kernel and arch.family == "lm":
        raise UserError(f"{where}.mixer = {block.mixer!r}: a convolution would see the words that are to be predicted")
    if block.token_scale and (arch.family != "vit" or block.mixer != "attn" or block.tokens is not None):
        raise UserError(f"{where}.token_scale: is for attention over all tokens of family 'vit' only")


def _validate_tokens(arch: Arch, block: Block, where: str) -> None:
    if arch.family != "vit" or block.conv_kernel:
        what = f"family {arch.family!r}" if arch.family != "vit" else f"mixer {block.mixer!r}"
        raise UserError(f"{where}.tokens = {block.tokens}: {what} needs the whole grid of patches; leave it out")
    patches = arch.tokens - arch.prefix_tokens
    least = arch.prefix_tokens + 1
    if type(block.tokens) is not int or not least <= block.tokens <= arch.tokens:
        plural = "" if arch.prefix_tokens == 1 else "s"
        raise UserError(
            f"{where}.tokens = {block.tokens!r}: must lie in {least}..{arch.tokens} "
            f"({patches} patches + {arch.prefix_tokens} prefix token{plural})"
        )


def _validate_text(arch: Arch) -> None:
    if (arch.text is None) == (arch.family == "lm"):
        needs = "family 'lm' needs its vocabulary" if arch.text is None else "is for family 'lm' only"
        raise UserError(f"text: {needs}")
    if arch.text is not None:
        _validate_vocabulary(arch, arch.text)


def _validate_vocabulary(arch: Arch, text: Text) -> None:
    _one_of("act", arch.act, ACTIVATIONS)
    _one_of("text.tied", text.tied, TIED)
    if arch.img_size[0] != 1:
        raise UserError(f"img_size = {list(arch.img_size)}: a text has one row of words, [1, length]")
    if not text.cutoffs or any(len(band) == 0 for band in arch.bands):
        raise UserError(
            f"text.cutoffs = {list(text.cutoffs)}: must be one or more, ascending in 1..{arch.num_classes - 1}"
        )
    if len(text.tails) != len(text.cutoffs):
        raise UserError(f"text.tails = {list(text.tails)}: must have one width per cutoff, {len(text.cutoffs)}")
    for j, width in enumerate(text.tails):
        _at_least(f"text.tails[{j}]", width, 1)
    if not isinstance(text.embed_scale, float) or not text.embed_scale > 0:
        raise UserError(f"text.embed_scale = {text.embed_scale!r}: must be a positive float (the source's D ** 0.5)")
    _at_least("text.positions", text.positions, max(4, arch.stages[0].width))
    if text.positions % 2:
        raise UserError(f"text.positions = {text.positions}: must be even, as many sines as cosines")
    _at_least("text.first_position", text.first_position, 0)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise UserError(f"{name} = {value!r}: must be one of {', '.join(allowed)}. {hint}".strip())


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} = {value!r}: must be a whole number of at least {least}")
