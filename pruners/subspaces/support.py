"""Models that can be recovered and compressed, and the reasons why others cannot."""

from __future__ import annotations

from prunesweep.models import Arch
from prunesweep.models.families import FamiliesWith, family_of, names_with

__all__ = ["can_recover"]

NEEDS = ("streams",)  # of a family


def can_recover(arch: Arch) -> str | None:
    """Say why a source of this record cannot be refitted; None where it can.

    Args:
        arch: the source's record, not that of a cut model.
    """
    if not family_of(arch).supports(*NEEDS):
        able, reason = names_with(*NEEDS), FamiliesWith(*NEEDS).why_not(arch.family)
        return f"{arch.source} is of family {arch.family!r}: subspaces are computed for {able}; {reason}"
    if arch.parallel:
        return f"{arch.source}: its MLPs read what attention reads, and halves of blocks are fitted one after the other"
    for i, block in enumerate(arch.blocks):
        if block.conv_kernel or block.tokens is not None or block.token_scale or block.norm_residual:
            return f"{arch.source}: blocks[{i}] has a convolution, a token plan or token factors"
    return None
