"""Published architectures from compact data: the dense models, and those that five methods made of them.

A dense record equals ``Arch.from_timm``'s of the same name, without building the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError

__all__ = ["deit", "mae", "prune_and_merge", "pvt_v2", "revit", "searched", "skip_blocks", "spvit", "swin"]

HEAD = 64  # width of every head of DeiT, and of the value heads of ReViT
REVIT_RULES = ("code", "paper")


def _attention(src: int, heads: int, width: int, mlp: int, *, sr: int = 0, shifted: bool = False) -> Block:
    return Block(src=src, heads=heads, qk=width, v=width, scale=width**-0.5, mlp=mlp, sr=sr, shifted=shifted)


def _vit(source: str, width: int, blocks: Iterable[Block]) -> Arch:
    return Arch(
        family="vit",
        source=source,
        img_size=(224, 224),
        patch_size=(16, 16),
        in_chans=3,
        num_classes=1000,
        stages=(Stage(width=width, grid=(14, 14), blocks=tuple(blocks)),),
    )


def deit(size: str, *, distilled: bool = False, source: str | None = None) -> Arch:
    """Return the record of DeiT at 224 (arXiv 2012.12877, table 1).

    Args:
        size: ``tiny``, ``small`` or ``base``.
        distilled: with the distillation token.
        source: name of another model of the same shape; by default timm's name of the DeiT.
    """
    heads = {"tiny": 3, "small": 6, "base": 12}[size]
    width = heads * HEAD
    name = source or f"deit_{size}{'_distilled' * distilled}_patch16_224"
    dense = _vit(name, width, (_attention(i, heads, HEAD, 4 * width) for i in range(12)))
    return dataclasses.replace(dense, dist_token=distilled)


def mae() -> Arch:
    """Return the record of ViT-B as it is finetuned after masked autoencoding (arXiv 2111.06377).

    Its patches are averaged, then normalised.
    """
    return dataclasses.replace(deit("base", source="vit_base_patch16_224.mae"), pool="avg", head_norm="pooled")


def swin(size: str) -> Arch:
    """Return the record of Swin ``tiny``, ``small`` or ``base`` at 224, windows 7 (arXiv 2103.14030, section 3.3)."""
    width, third = {"tiny": (96, 6), "small": (96, 18), "base": (128, 18)}[size]
    stages, src = [], 0
    for s, depth in enumerate((2, 2, third, 2)):
        own, side = width * 2**s, 56 // 2**s
        places = ((src + b, b % 2 == 1 and side > 7) for b in range(depth))
        blocks = tuple(_attention(i, own // 32, 32, 4 * own, shifted=shifted) for i, shifted in places)
        stages.append(Stage(width=own, grid=(side, side), blocks=blocks, window=(7, 7)))
        src += depth
    return _pyramid("swin", f"swin_{size}_patch4_window7_224", stages, norm_eps=1e-5)


def pvt_v2(size: str) -> Arch:
    """Return the record of PVTv2 ``b0`` to ``b3`` at 224 (arXiv 2106.13797, table 1)."""
    widths = (32, 64, 160, 256) if size == "b0" else (64, 128, 320, 512)
    depths = {"b0": (2, 2, 2, 2), "b1": (2, 2, 2, 2), "b2": (3, 4, 6, 3), "b3": (3, 4, 18, 3)}[size]
    stages, src = [], 0
    shapes = zip(widths, depths, (1, 2, 5, 8), (8, 4, 2, 1), (8, 8, 4, 4), strict=True)
    for s, (width, depth, heads, ratio, expansion) in enumerate(shapes):
        sr = width if ratio > 1 else 0
        blocks = tuple(_attention(src + b, heads, width // heads, expansion * width, sr=sr) for b in range(depth))
        stages.append(Stage(width=width, grid=(56 // 2**s, 56 // 2**s), blocks=blocks, sr_ratio=ratio))
        src += depth
    return _pyramid("pvt_v2", f"pvt_v2_{size}", stages, norm_eps=1e-6)


def _pyramid(family: str, source: str, stages: Sequence[Stage], *, norm_eps: float) -> Arch:
    return Arch(
        family=family,
        source=source,
        img_size=(224, 224),
        patch_size=(4, 4),
        in_chans=3,
        num_classes=1000,
        stages=tuple(stages),
        class_token=False,
        pool="avg",
        norm_eps=norm_eps,
    )


def revit(embed: int, *, rule: str = "code", distilled: bool = False) -> Arch:
    """Return the record of a ReViT: NViT's redistribution of a ViT's parameters over 12 blocks (arXiv 2110.04869).

    Heads, query/key width and MLP follow D linearly and are doubled in the middle; value heads stay at 64, and so does
    the attention scale at 64 ** -0.5.

    Args:
        embed: D, the residual width.
        rule: ``code``, that of the authors' code, which alone gives the published costs: it rounds before it doubles,
            and the first and last block have 10 heads; or ``paper``, that of table 6.
        distilled: with DeiT's distillation token, with which the published accuracies were reached; the published
            costs are without it.

    Raises:
        UserError: another rule, or a width so small that the rule leaves a block no head or no query channel.
    """
    if rule not in REVIT_RULES:
        raise UserError(f"rule = {rule!r}: must be one of {', '.join(REVIT_RULES)}")
    shapes = _revit_code(embed) if rule == "code" else _revit_paper(embed)
    if min(min(heads, qk) for heads, qk, _ in shapes) < 1:
        raise UserError(f"embed = {embed}: too narrow, ReViT's rule {rule!r} leaves a block without heads or channels")
    blocks = (
        Block(src=i, heads=heads, qk=qk, v=HEAD, scale=HEAD**-0.5, mlp=mlp) for i, (heads, qk, mlp) in enumerate(shapes)
    )
    return dataclasses.replace(_vit(f"revit_{embed}", embed, blocks), dist_token=distilled)


def _revit_code(embed: int) -> list[tuple[int, int, int]]:
    """(heads, query/key width, MLP width) of every block."""
    pairs, eights = round(0.005 * embed), round(embed / 160)
    outer, middle = (2 * pairs, 8 * eights, 3 * embed), (4 * pairs, 16 * eights, 6 * embed)
    end = (10, 16 * eights, 3 * embed)
    return [end, outer, outer, *[middle] * 6, outer, outer, end]


def _revit_paper(embed: int) -> list[tuple[int, int, int]]:
    outer, middle = (
        (2 * round(factor * embed / 200), 8 * round(factor * embed / 160), 3 * factor * embed) for factor in (1, 2)
    )
    return [*[outer] * 3, *[middle] * 6, *[outer] * 3]


def spvit(source: Arch, choices: str, mlp: Sequence[int]) -> Arch:
    """Apply SPViT's choices to the record of a dense DeiT or Swin (arXiv 2111.11802).

    Args:
        source: the dense record.
        choices: one letter per block: ``M`` attention, ``1`` or ``3`` the convolution of that kernel, whose bottleneck
            is one head wide, ``s`` skip, which adds the normalised input as the finetuned models do. Spaces are free.
        mlp: hidden units kept in every block.
    """
    choices = choices.replace(" ", "")
    decided = iter(zip(choices, mlp, strict=True))

    def change(block: Block) -> Block:
        choice, width = next(decided)
        if choice == "M":
            return dataclasses.replace(block, mlp=width)
        if choice == "s":
            return Block(src=block.src, mixer="none", heads=0, qk=0, v=0, scale=0.0, mlp=width, norm_residual=True)
        mixer = {"1": "conv1x1", "3": "conv3x3"}[choice]
        return Block(src=block.src, mixer=mixer, heads=0, qk=0, v=block.qk, scale=0.0, mlp=width)

    stages = (dataclasses.replace(stage, blocks=tuple(map(change, stage.blocks))) for stage in source.stages)
    return dataclasses.replace(source, stages=tuple(stages))


# Choices and kept hidden units of SPViT's released models, block by block, stages apart.
_SEARCHED = {
    "deit_tiny": ("11MMMMMMMMMM", "744 758 764 767 766 764 756 659 633 473 179 145"),
    "deit_small": ("1MMMMMMMMMMM", "1304 1399 1344 1214 1251 1183 1140 925 742 391 104 103"),
    "deit_base": ("11133MMMMMMM", "1118 489 1050 1345 1336 1326 1431 1564 1606 1702 1290 190"),
    "deit_base_11g7": ("1113MMMMMMMM", "1253 610 1343 1912 2354 2306 2483 2753 2869 2860 2443 934"),
    "swin_tiny": ("1s 1s MMMMMM MM", "186 152 646 504 1350 1319 1289 1249 1234 1082 3041 2994"),
    "swin_small": (
        "1s MM MMMMMMMMMMMMs1MMss MM",
        "188 209 748 680 1159 1260 1127 1036 919 916 868 918 903 937 961 1037 1063 996 888 866 741 509 3064 3051",
    ),
    "swin_base": (
        "Ms MM MMMMMMMsMMMMMMs1Ms MM",
        "311 303 1011 980 1763 1673 1636 1523 1410 1377 1332 1345 "
        "1440 1426 1400 1315 1371 1321 1324 1265 1127 734 3572 2931",
    ),
}


def searched(name: str) -> Arch:
    """Return the record of a released SPViT model: family, size and, where there are two, its MACs.

    The names are those of the results in the released code's README.
    """
    family, size = name.split("_")[:2]
    choices, mlp = _SEARCHED[name]
    return spvit({"deit": deit, "swin": swin}[family](size), choices, [int(width) for width in mlp.split()])


def skip_blocks(source: Arch, keep: str) -> Arch:
    """Leave out blocks of a ViT's record, as UVC's skip configuration does (arXiv 2203.08243).

    Args:
        source: the record of a ViT.
        keep: ``1`` (runs) or ``0`` (left out) for every block, in order.

    Raises:
        ValueError: ``keep`` has another length than the model has blocks.
    """
    (stage,) = source.stages
    blocks = tuple(block for block, kept in zip(stage.blocks, keep, strict=True) if kept == "1")
    return dataclasses.replace(source, stages=(dataclasses.replace(stage, blocks=blocks),))


def prune_and_merge(source: Arch, keep_rate: float) -> Arch:
    """Give every block of a ViT's record the same reduced number of tokens (Prune-and-Merge, arXiv 2503.23455).

    Args:
        source: the record of a ViT with P patches.
        keep_rate: share of the patches; a block gets int(P * keep_rate) tokens and the prefix tokens.
    """
    (stage,) = source.stages
    tokens = int((source.tokens - source.prefix_tokens) * keep_rate) + source.prefix_tokens
    blocks = tuple(dataclasses.replace(block, tokens=tokens) for block in stage.blocks)
    return dataclasses.replace(source, stages=(dataclasses.replace(stage, blocks=blocks),))
