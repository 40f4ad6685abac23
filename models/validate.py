"""Checks that a record can be built; every message names the field, its value and what is allowed.

What depends on the family is asked of its capabilities; what only one family can tell, it checks itself
(``check_fields``, ``check_whole``).
"""

from __future__ import annotations

from .arch import Arch, Block, Stage
from .errors import UserError
from .families import Family, family_of, names_with
from .families.checks import check_at_least, check_one_of

__all__ = ["MIXERS", "validate"]

MIXERS = ("attn", "conv1x1", "conv3x3", "sepconv", "pool", "xca", "none")
NORMS = ("layer", "rms", "group")
POOLS = ("token", "avg", "map", "none")
HEAD_NORMS = ("tokens", "pooled", "both", "none")
MERGES = ("sparse", "dense")


def validate(arch: Arch) -> None:
    """Raise UserError naming the first field that makes ``arch`` impossible to build."""
    family = family_of(arch)
    check_one_of("pool", arch.pool, POOLS)
    check_one_of("head_norm", arch.head_norm, HEAD_NORMS)
    check_one_of("norm", arch.norm, NORMS)
    check_at_least("head_mlp", arch.head_mlp, 0)
    check_at_least("in_chans", arch.in_chans, 1)
    check_at_least("num_classes", arch.num_classes, 1 if arch.feature_head or family.supports("text") else 0)
    check_at_least("reg_tokens", arch.reg_tokens, 0)
    for i, (image, patch) in enumerate(zip(arch.img_size, arch.patch_size, strict=True)):
        check_at_least(f"patch_size[{i}]", patch, 1)
        if image < patch:
            raise UserError(f"img_size[{i}] = {image}: must be at least patch_size[{i}] = {patch}")
    family.check_fields(arch)
    _validate_stages(family, arch)
    if (arch.text is None) == family.supports("text"):
        needs = (
            f"family {arch.family!r} needs its vocabulary" if arch.text is None else f"is for {names_with('text')} only"
        )
        raise UserError(f"text: {needs}")
    family.check_whole(arch)


def _validate_stages(family: Family, arch: Arch) -> None:
    one = family.single_stage
    if not arch.stages or (one and len(arch.stages) != 1):
        number = "exactly one stage" if one else "at least one stage"
        raise UserError(f"stages: a {arch.family} has {number}, got {len(arch.stages)}")
    for s, (stage, grid) in enumerate(zip(arch.stages, family.grids(arch), strict=True)):
        where = f"stages[{s}]"
        check_at_least(f"{where}.width", stage.width, 1)
        if stage.grid != grid:
            raise UserError(f"{where}.grid = {list(stage.grid)}: img_size / patch_size gives {list(grid)}")
        if not stage.blocks:
            raise UserError(f"{where}.blocks is empty: at least one block must be kept")
        _validate_stage(family, stage, where)
        for b, block in enumerate(stage.blocks):
            _validate_block(family, arch, stage, block, f"{where}.blocks[{b}]")


def _validate_stage(family: Family, stage: Stage, where: str) -> None:
    windows = family.supports("windows")
    if (stage.window is None) == windows:
        needs = "needs the size of its attention windows" if windows else f"is for {names_with('windows')} only"
        raise UserError(f"{where}.window = {stage.window!r}: {needs}")
    for i, side in enumerate(stage.window or ()):
        if not 1 <= side <= stage.grid[i]:
            raise UserError(f"{where}.window[{i}] = {side}: must lie in 1..{stage.grid[i]}, the grid's side")
    for i, side in enumerate(stage.reference_window or ()):
        if not family.refers_to_windows:
            raise UserError(f"{where}.reference_window: family {family.name!r} has no distances in parts of a window")
        check_at_least(f"{where}.reference_window[{i}]", side, 1)
    if stage.res_scale and not family.supports("local_mixers"):
        raise UserError(f"{where}.res_scale: is for {names_with('local_mixers')} only")
    check_at_least(f"{where}.sr_ratio", stage.sr_ratio, 1)
    reduces = family.supports("spatial_reduction")
    if stage.sr_ratio > 1 and (not reduces or stage.sr_ratio > min(stage.grid)):
        limit = (
            f"must not exceed the grid {list(stage.grid)}"
            if reduces
            else f"is for {names_with('spatial_reduction')} only"
        )
        raise UserError(f"{where}.sr_ratio = {stage.sr_ratio}: {limit}")


def _validate_block(family: Family, arch: Arch, stage: Stage, block: Block, where: str) -> None:
    check_one_of(f"{where}.mixer", block.mixer, MIXERS)
    check_one_of(f"{where}.merge", block.merge, MERGES)
    check_at_least(f"{where}.src", block.src, 0)
    check_at_least(f"{where}.mlp", block.mlp, 0)
    if block.mixer == "attn":
        _validate_attention(block, where)
    elif block.mixer == "xca":
        _validate_channel_attention(block, where)
    else:
        _validate_other_mixer(block, where)
    _validate_extras(family, arch, stage, block, where)
    if block.tokens is not None:
        _validate_tokens(family, arch, block, where)


def _validate_attention(block: Block, where: str) -> None:
    check_at_least(f"{where}.heads", block.heads, 1)
    check_at_least(f"{where}.qk", block.qk, 1)
    if len(block.v_widths) != block.heads:
        raise UserError(f"{where}.v has {len(block.v_widths)} widths for {block.heads} heads: give one per head")
    for head, width in enumerate(block.v_widths):
        check_at_least(f"{where}.v[{head}]", width, 1)
    if not isinstance(block.scale, float) or not block.scale > 0:
        raise UserError(f"{where}.scale = {block.scale!r}: must be a positive float (the source's E ** -0.5)")


def _validate_channel_attention(block: Block, where: str) -> None:
    check_at_least(f"{where}.heads", block.heads, 1)
    check_at_least(f"{where}.qk", block.qk, 1)
    if block.v != block.qk:
        raise UserError(f"{where}.v = {block.v!r}: must be qk, {block.qk}, where mixer is 'xca'")
    if block.scale != 0:
        raise UserError(f"{where}.scale = {block.scale!r}: must be 0 where mixer is 'xca', whose factor is learned")


def _validate_other_mixer(block: Block, where: str) -> None:
    if (block.heads, block.qk, block.scale) != (0, 0, 0.0):
        raise UserError(f"{where}: heads, qk and scale must be 0 where mixer is {block.mixer!r}")
    if not block.convolves:
        if block.v != 0:
            raise UserError(f"{where}.v = {block.v!r}: must be 0 where mixer is {block.mixer!r}")
    else:
        check_at_least(f"{where}.v", block.v, 1)


def _validate_extras(family: Family, arch: Arch, stage: Stage, block: Block, where: str) -> None:
    """Check the fields that only one family or one mixer has."""
    reduced = (stage.sr_ratio > 1 or arch.pooled_map > 0) and block.mixer == "attn"
    check_at_least(f"{where}.sr", block.sr, int(reduced))
    if block.sr and not reduced:
        raise UserError(f"{where}.sr = {block.sr}: must be 0 without attention on a spatially reduced map")
    attends = block.mixer == "attn"
    if block.shifted and not (attends and family.supports("windows")):
        raise UserError(f"{where}.shifted: is for attention in the windows of {names_with('windows')} only")
    if block.whole_map and not (attends and family.leaves_windows):
        raise UserError(f"{where}.whole_map: family {family.name!r} has no attention that leaves its stage's windows")
    if block.norm_residual and block.mixer != "none":
        raise UserError(f"{where}.norm_residual: is for mixer 'none' only, got {block.mixer!r}")
    if block.conv_kernel and not family.supports("convolutions"):
        text = "a convolution would see the words that are to be predicted"
        reason = text if family.supports("text") else f"is for {names_with('convolutions')} only"
        raise UserError(f"{where}.mixer = {block.mixer!r}: {reason}")
    if block.mixer in ("pool", "sepconv") and not family.supports("local_mixers"):
        raise UserError(f"{where}.mixer = {block.mixer!r}: is for {names_with('local_mixers')} only")
    if block.mixer == "xca" and not family.supports("channel_attention"):
        raise UserError(f"{where}.mixer = 'xca': is for {names_with('channel_attention')} only")
    if block.token_scale and not (attends and block.tokens is None and family.supports("token_scale")):
        raise UserError(f"{where}.token_scale: is for attention over all tokens of {names_with('token_scale')} only")


def _validate_tokens(family: Family, arch: Arch, block: Block, where: str) -> None:
    planned = family.supports("tokens")
    if not planned or block.conv_kernel:
        what = f"mixer {block.mixer!r}" if planned else f"family {family.name!r}"
        raise UserError(f"{where}.tokens = {block.tokens}: {what} needs the whole grid of patches; leave it out")
    patches = arch.tokens - arch.prefix_tokens
    least = arch.prefix_tokens + 1
    if type(block.tokens) is not int or not least <= block.tokens <= arch.tokens:
        plural = "" if arch.prefix_tokens == 1 else "s"
        raise UserError(
            f"{where}.tokens = {block.tokens!r}: must lie in {least}..{arch.tokens} "
            f"({patches} patches + {arch.prefix_tokens} prefix token{plural})"
        )
