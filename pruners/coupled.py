"""Sums over all weights that leave a model together with a unit.

Which weights those are is what ``models.cut`` knows: a unit's group is every tensor that has it on one of its axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from prunesweep.models import Arch, UserError
from prunesweep.models.cutting import tensor_axes

from .scores import vector_sizes

__all__ = ["KINDS", "coupled_sums", "heads_and_dims"]

KINDS = ("embed", "attn", "mlp", "sr", "tail")


def coupled_sums(arch: Arch, terms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For every unit of ``KINDS``, the float64 sum of ``terms`` over all entries that are cut with it.

    Args:
        arch: the model's record.
        terms: a tensor for some names of the model's state dict, for example |w * dL/dw|; the others do not count.

    Raises:
        UserError: a block's heads have unequal or different query/key and value widths.
    """
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in vector_sizes(arch, KINDS).items()}
    for name, tensor in terms.items():
        for axis, units in enumerate(tensor_axes(arch, name)):
            if units:
                total = tensor.transpose(0, axis).flatten(1).sum(1) if tensor.dim() > 1 else tensor
                for vector, part in _parts(arch, units, total.double().cpu()):
                    if vector in sums:
                        sums[vector] += part
    return sums


def _parts(arch: Arch, units: str, total: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The vectors that one axis of a tensor adds to, and what it adds."""
    place, _, axis = units.rpartition(".")
    if axis == "merged":
        yield f"{place}.embed", total.view(4, -1).sum(0)
    elif axis in ("q", "kv", "qkv"):
        yield f"{place}.attn", total.view(len(axis), -1).sum(0)
    elif axis == "v":
        if arch.blocks[int(place.split(".")[1])].mixer == "attn":
            yield f"{place}.attn", total
    else:
        yield units, total


def heads_and_dims(arch: Arch, index: int, attn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's channel scores (H·E) averaged over a head's channels (H) and over the heads (E)."""
    block = arch.blocks[index]
    if attn.numel() != block.heads * block.qk:
        raise UserError(f"scores: blocks.{index}.attn has {attn.numel()} entries for {block.heads} heads of {block.qk}")
    per_head = attn.view(block.heads, -1)
    return per_head.mean(1), per_head.mean(0)
