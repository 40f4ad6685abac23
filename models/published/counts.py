"""The ways in which five papers count their own models.

``models.cost`` counts everything that is computed and stored. Papers leave parts out, or count parts that are not
there; these formulas serve only to reproduce the figures that they print (``models.published``).

N tokens, D residual width, H heads, E query/key width and V value width of a head, M MLP width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunesweep.models.arch import Arch, Block, Stage

if TYPE_CHECKING:
    from prunesweep.models.families.block_costs import Cost

__all__ = ["NVIT", "PMVIT", "SPVIT", "UVC", "Counting", "exact_macs", "exact_params", "tables_twice"]


def cost(arch: Arch) -> Cost:
    """Count a record exactly, by ``models.cost``, which loads torch: only when something is counted."""
    from prunesweep.models.counting import cost as exact

    return exact(arch)


def exact_macs(arch: Arch) -> int:
    """Count MACs per image as ``models.cost`` does."""
    return cost(arch).macs


def exact_params(arch: Arch) -> int:
    """Count parameters as ``models.cost`` does."""
    return cost(arch).params


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """A paper's way to count MACs per image and parameters; ``note`` says how it differs from the exact one."""

    note: str
    macs: Callable[[Arch], int] = exact_macs
    params: Callable[[Arch], int] = exact_params


def tables_twice(arch: Arch) -> int:
    """Count a language model's parameters as UP-ViT does: word tables shared by input and softmax count twice."""
    widths = () if arch.text is None else (arch.stages[0].width, *arch.text.tails)
    shared = arch.text is not None and arch.text.tied != "none"
    return cost(arch).params + shared * sum(len(band) * d for band, d in zip(arch.bands, widths, strict=True))


def _nvit_macs(arch: Arch) -> int:
    return cost(dataclasses.replace(arch, dist_token=False)).macs


def _nvit_params(arch: Arch) -> int:
    (stage,) = arch.stages
    pixels = arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
    blocks = sum(2 * block.heads * block.qk + 2 * block.total_v + 2 * block.mlp for block in stage.blocks)
    return stage.width * (pixels + arch.num_classes + blocks)


def _spvit_macs(arch: Arch) -> int:
    """Count a norm as one MAC per element, without ViT's last, and Swin's as R²·D // 2^stages on R² patches."""
    from prunesweep.models.families import family_of

    macs = cost(arch).macs
    for stage in arch.stages:
        patches = stage.grid[0] * stage.grid[1]
        macs += len(stage.blocks) * 2 * stage.width * (patches + arch.prefix_tokens)
        macs -= arch.prefix_tokens * sum(2 * stage.width * block.mlp for block in stage.blocks)
    if family_of(arch).supports("windows"):
        patches = arch.stages[0].grid[0] * arch.stages[0].grid[1]
        macs += patches * arch.stages[0].width + arch.stages[-1].width * patches // 2 ** len(arch.stages)
        macs += sum(stage.width * stage.grid[0] * stage.grid[1] for stage in arch.stages[:-1])
    return macs


def _spvit_params(arch: Arch) -> int:
    convolutions = ((stage, block) for stage in arch.stages for block in stage.blocks if block.conv_kernel)
    return cost(arch).params + sum(_spvit_unfrozen(stage, block) for stage, block in convolutions)


def _spvit_unfrozen(stage: Stage, block: Block) -> int:
    """Count what a convolution has before freezing beyond the frozen form: full V and projection, 9 mixes of heads."""
    width, bottleneck = stage.width, block.total_v
    mixed = 2 * width**2 + 2 * width + 9 * (width // bottleneck) + 2 * bottleneck
    return mixed - ((block.conv_kernel**2 + 1) * width * bottleneck + width + 3 * bottleneck)


def _uvc_macs(arch: Arch) -> int:
    """Count V's own rows as Q's; attention, projection and MLP as they are kept."""
    (stage,) = arch.stages
    N, D = arch.tokens, stage.width
    macs = D * (N - arch.prefix_tokens) * arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
    for block in stage.blocks:
        queries = block.heads * block.qk
        macs += (3 * N * D + N**2) * queries + (N**2 + N * D) * block.total_v + 2 * N * D * block.mlp
    return macs


def _pmvit_macs(arch: Arch) -> int:
    (stage,) = arch.stages
    D, patches = stage.width, arch.tokens - arch.prefix_tokens
    macs = patches * arch.num_classes * D
    for block in stage.blocks:
        c, width = block.tokens or arch.tokens, block.heads * block.qk
        macs += 4 * c * D * width + 2 * c**2 * width + block.heads * c**2 + 2 * c * D * block.mlp
    return macs


NVIT = Counting(
    note="NViT counts the MACs of the form without distillation token, and as parameters only weight matrices "
    "(no biases, norms, tokens or position embedding).",
    macs=_nvit_macs,
    params=_nvit_params,
)
SPVIT = Counting(
    note="SPViT counts norms as MACs and DeiT's MLPs without the class token, and the parameters of the form that is "
    "finetuned, whose convolutions are mixed from the full value and projection matrices.",
    macs=_spvit_macs,
    params=_spvit_params,
)
UVC = Counting(
    note="UVC leaves the classifier out and counts the rows of V with the heads, not with the kept channels.",
    macs=_uvc_macs,
)
PMVIT = Counting(
    note="Prune-and-Merge leaves the patch embedding out, and counts the softmax and a classifier on every patch.",
    macs=_pmvit_macs,
)
