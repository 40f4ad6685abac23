"""The widths of a cut, for a model that is projected to them: a method says how many, the subspace says what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate

from prunesweep.models import Arch, BlockCut, Cut, UserError
from prunesweep.models.arch import Block

from .widths import BlockWidths, Widths, can_narrow

__all__ = ["projectable", "projected_groups", "projected_widths"]


def projected_widths(arch: Arch, decision: Cut) -> Widths:
    """Count what a cut keeps of every space.

    Every head of the source stays: the query/key and value channels that the cut keeps of a block are shared out among
    all of its heads, so that logits and values cost what they cost in the cut model, or up to one channel a head less.
    Convolutions in place of attention, of as many bottleneck channels, and token plans are the cut's.

    Args:
        arch: the source's record.
        decision: a cut of the source.

    Returns:
        The widths for ``compress``.

    Raises:
        UserError: the cut does not fit the source.
    """
    if len(decision.blocks) != arch.depth:
        raise UserError(f"the cut has {len(decision.blocks)} blocks, {arch.source} has {arch.depth}")
    embed = None if decision.embed is None else tuple(None if own is None else len(own) for own in decision.embed)
    return Widths(embed=embed, blocks=tuple(_block(arch, i, own) for i, own in enumerate(decision.blocks)))


def projected_groups(arch: Arch, groups: Mapping[str, int]) -> dict[str, int]:
    """Leave whole what a projected model has whole: heads, and queries and keys or values that cannot be narrowed.

    A cut with these groups has the record, and so the cost, of the model that is projected to its widths.

    Args:
        arch: the source's record.
        groups: units per group by kind; 0 leaves a kind whole.
    """
    attends = [i for i, block in enumerate(arch.blocks) if block.mixer == "attn"]
    chosen = [
        kind
        for kind, space in (("qk", "q"), ("v", "v"))
        if any(not can_narrow(arch, f"blocks.{i}.{space}") for i in attends)
    ]
    return {**groups, "heads": 0, **dict.fromkeys(chosen, 0)}


def projectable(arch: Arch, decision: Cut) -> Cut:
    """Return the cut with the record, and so the cost, of the model that is projected to a decision's widths.

    Like any candidate that is projected, it keeps every head, and what of it cannot be narrowed; channels
    and units are the first ones, as the subspace decides what stays.

    Args:
        arch: the source's record.
        decision: a cut of the source, with heads gone or not.

    Raises:
        UserError: the cut does not fit the source.
    """
    widths = projected_widths(arch, decision)
    assert widths.embed is None or isinstance(widths.embed, tuple)
    pairs = enumerate(zip(decision.blocks, widths.blocks, strict=True))
    return Cut(
        embed=None if widths.embed is None else tuple(None if n is None else tuple(range(n)) for n in widths.embed),
        blocks=tuple(_first(arch, i, block, own) for i, (block, own) in pairs),
        tails=decision.tails,
    )


def _first(arch: Arch, i: int, decided: BlockCut, own: BlockWidths) -> BlockCut:
    """Keep the first channels and units of a block, as many as ``own`` says."""
    block, qk, v = arch.blocks[i], decided.qk, decided.v
    if decided.mixer is None and own.qk is not None and isinstance(own.v, tuple):
        width = own.qk if can_narrow(arch, f"blocks.{i}.q") else block.qk
        starts = [0, *accumulate(block.v_widths)]
        qk = tuple(tuple(range(h * block.qk, h * block.qk + width)) for h in range(block.heads))
        values = own.v if can_narrow(arch, f"blocks.{i}.v") else block.v_widths
        v = tuple(tuple(range(start, start + n)) for start, n in zip(starts, values, strict=False))
    return dataclasses.replace(
        decided,
        qk=qk,
        v=v,
        mlp=None if decided.mlp is None else tuple(range(len(decided.mlp))),
        sr=None if decided.sr is None else tuple(range(len(decided.sr))),
    )


def _block(arch: Arch, i: int, own: BlockCut) -> BlockWidths:
    block = arch.blocks[i]
    v: int | tuple[int, ...] | None = None
    if own.v is not None:
        convolution = own.mixer is not None
        v = min(max(map(len, own.v)), min(block.v_widths)) if convolution else _shares(block, _total(own.v))
    return BlockWidths(
        keep=own.keep,
        mixer=own.mixer,
        qk=None if own.qk is None else max(1, _total(own.qk) // block.heads),
        v=v,
        mlp_half=own.mlp != (),
        mlp=len(own.mlp) if own.mlp else None,
        sr=None if own.sr is None else len(own.sr),
        tokens=own.tokens,
    )


def _total(heads: Sequence[Sequence[int]]) -> int:
    return sum(map(len, heads))


def _shares(block: Block, total: int) -> tuple[int, ...]:
    """Split value channels evenly among a block's heads, none of which can hold more than it had."""
    widths = [1] * block.heads
    while sum(widths) < total:
        _, head = min((width, h) for h, width in enumerate(widths) if width < block.v_widths[h])
        widths[head] += 1
    return tuple(widths)
