"""Sums over all weights that leave a model together with a unit.

``models.cut`` determines which weights those are: a unit's group is every tensor that has it on one of its axes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch

from prunesweep.models import Arch, UserError
from prunesweep.models.families import family_of

from .scores import vector_sizes

__all__ = ["KINDS", "coupled_sums", "heads_and_dims"]

KINDS = ("embed", "attn", "mlp", "sr", "tail")


def coupled_sums(arch: Arch, terms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum ``terms``, for every unit of ``KINDS``, over all entries that are cut with it, in float64.

    Args:
        arch: the model's record.
        terms: a tensor for some names of the model's state dict, for example |w * dL/dw|; the others do not count.

    Raises:
        UserError: a block's heads have unequal or different query/key and value widths.
    """
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in vector_sizes(arch, KINDS).items()}
    family = family_of(arch)
    sizes = family.spaces(arch)
    for name, tensor in terms.items():
        for axis, units in enumerate(family.axes(arch, name)):
            spaces = family.parts(units)
            if not spaces:
                continue
            total = tensor.transpose(0, axis).flatten(1).sum(1) if tensor.dim() > 1 else tensor
            parts = torch.split(total.double().cpu(), [sizes[space] for space in spaces])
            vectors = [space if space in sums else _vector(space, sums) for space in spaces]
            for vector in dict.fromkeys(vectors):  # an axis may count a vector's units several times over
                if vector in sums:
                    own = [part for part, where in zip(parts, vectors, strict=True) if where == vector]
                    # a unit of ``attn`` may have several value channels, which lie side by side
                    sums[vector] += torch.stack([part.view(len(sums[vector]), -1).sum(1) for part in own]).sum(0)
    return sums


def _vector(space: str, scored: Container[str]) -> str:
    """Name the vector whose units a space's channels are; queries, keys and values share one, or are of heads."""
    place, _, own = space.rpartition(".")
    if own not in ("q", "k", "v"):
        return space
    return f"{place}.heads" if f"{place}.heads" in scored else f"{place}.attn"


def heads_and_dims(arch: Arch, index: int, attn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Average a block's channel scores over the channels of a head, and over the heads.

    Args:
        arch: the model's record.
        index: number of the block.
        attn: scores (H·E,), head after head.

    Returns:
        (scores of heads (H,), scores of channels (E,)).

    Raises:
        UserError: ``attn`` has another number of entries.
    """
    block = arch.blocks[index]
    if attn.numel() != block.heads * block.qk:
        raise UserError(f"scores: blocks.{index}.attn has {attn.numel()} entries for {block.heads} heads of {block.qk}")
    per_head = attn.view(block.heads, -1)
    return per_head.mean(1), per_head.mean(0)
