"""Allocation of ranks and units to blocks: one-block losses propose, an exact cost decides.

Every space of every block is narrowed alone to a few levels, refitted, and its KL to the source measured on images that
the fits have not seen, with all other blocks whole. The sums of these losses are below the true KL but rank well, so
for a given residual width the levels of all blocks follow from

    minimise  sum_b,s loss_b,s(level)   subject to   cost(levels) <= budget

which is a multiple-choice knapsack: the lower convex hull by a multiplier found by bisection, then single steps up that
still fit. Costs are exact (``models.cost``) and add up over spaces once the residual width is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunesweep.models import Arch, block_views, cost
from prunesweep.models.families import family_of
from prunesweep.pruners.divergence import kl_divergence

from .compression import Compression, folded
from .refit import SHRINKAGE, tail
from .source import SourceStatistics, open_source, to_model
from .widths import BlockWidths, Embed, Widths, can_project, compressed_arch

__all__ = ["BlockLosses", "allocate", "measure_losses"]

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
SPACES = ("qk", "v", "sr", "mlp")
Choice = tuple[int, str]  # block and space
Objective = Callable[[Arch], int]


@dataclass(frozen=True)
class BlockLosses:
    """KL of every choice at every level, (block, space) -> {width: loss}; the full width has loss 0."""

    losses: Mapping[Choice, Mapping[int, float]]


def levels(full: int, align: int) -> list[int]:
    """List widths to try for a space, the full one first, all others multiples of ``align``."""
    rounded = {max(align, round(full * share / align) * align) for share in SHARES[1:]}
    return [full, *sorted((width for width in rounded if width < full), reverse=True)]


@torch.no_grad()
def measure_losses(
    model: Any,
    fit: Sequence[torch.Tensor],
    held_out: Sequence[torch.Tensor],
    statistics: SourceStatistics,
    *,
    align: int = 1,
    shrinkage: float = SHRINKAGE,
    progress: Callable[[int, int], None] | None = None,
) -> BlockLosses:
    """Measure what narrowing one space of one block costs, for all of them.

    Args:
        model: the source, in evaluation mode.
        fit: batches of images (B, C, rows, columns) or texts (B, T) for the fits.
        held_out: batches that the losses are measured on.
        statistics: of the source.
        align: widths are multiples of it.
        shrinkage: lambda of the fits.
        progress: told of models done and of all.
    """
    arch, model = open_source(model), folded(model)
    views, family = block_views(model, arch), family_of(arch)
    streams = [family.stem(model, to_model(model, batch)) for batch in (*fit, *held_out)]
    wanted = torch.cat([tail(model, arch, views, 0, stream) for stream in streams[len(fit) :]])
    found: dict[Choice, dict[int, float]] = {}
    tries = [(i, space, width) for i in range(arch.depth) for space, width in _tries(arch, i, align)]
    for view in views:
        i, stage = view.index, arch.stages[view.stage]
        if i and views[i - 1].stage < view.stage:
            streams = [family.entrance(model, arch, view.stage).run(stream) for stream in streams]
        after = streams
        for _, space, width in (own for own in tries if own[0] == i):
            choice = found.setdefault((i, space), {getattr(view.record, space): 0.0})
            own = BlockWidths(**{space: width})  # type: ignore[arg-type]
            widths = Widths(blocks=tuple(own if n == i else BlockWidths() for n in range(arch.depth)))
            work = Compression(model, widths, statistics, (), shrinkage=shrinkage, fitted=len(fit))
            middle, after = work.halves(stage, view, streams)
            small, z = work.small_views[i], middle
            if space != "mlp":
                assert small.attention is not None
                z = work.attention(stage, small.attention, view, streams, streams, middle)
            if small.mlp is not None:
                z = work.mlp(stage, small.mlp, view, middle, z, after)
            got = torch.cat([tail(model, arch, views, i + 1, one) for one in z[len(fit) :]])
            choice[width] = kl_divergence(wanted, got).mean().item()
            if progress:
                progress(sum(len(own) - 1 for own in found.values()), len(tries))
        if after is streams:
            after = [family.run_block(arch, stage, view.module, stream) for stream in streams]
        streams = after
    return BlockLosses(found)


def _tries(arch: Arch, i: int, align: int) -> list[tuple[str, int]]:
    """Spaces of a block that can be narrowed evenly over heads, with the widths to try."""
    block = arch.blocks[i]
    spaces = [space for space in SPACES if getattr(block, space) and isinstance(getattr(block, space), int)]
    if not can_project(arch, f"blocks.{i}.q"):
        spaces = [space for space in spaces if space != "qk"]
    return [(space, width) for space in spaces for width in levels(getattr(block, space), align)[1:]]


def allocate(
    arch: Arch,
    embed: Embed,
    losses: BlockLosses,
    limit: int,
    *,
    objective: Objective = lambda arch: cost(arch).macs,
    align: int = 1,
) -> Widths | None:
    """Choose all ranks and units for a residual width, so that the small model costs at most ``limit``.

    Args:
        arch: the source's record.
        embed: residual widths of the small model.
        losses: of ``measure_losses``.
        limit: the largest cost, in the objective's unit.
        objective: the cost of a record, additive over spaces.
        align: units of the MLPs are filled up in steps of it.

    Returns:
        The widths, or None where even the smallest levels cost more.
    """
    full = _objective_of(arch, embed, {}, objective)
    saved = {
        choice: {width: full - _objective_of(arch, embed, {choice: width}, objective) for width in own}
        for choice, own in losses.losses.items()
    }

    def chosen(price: float) -> dict[Choice, int]:
        return {
            choice: min(own, key=lambda width: (own[width] - price * saved[choice][width], -width))
            for choice, own in losses.losses.items()
        }

    def spent(widths: Mapping[Choice, int]) -> int:
        return full - sum(saved[choice][width] for choice, width in widths.items())

    low, high = 0.0, 1e-12
    while spent(chosen(high)) > limit:
        low, high = high, high * 4
        if high > 1e6:
            return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(chosen(middle)) > limit else (low, middle)
    found = chosen(high)
    _step_up(found, losses, saved, limit - spent(found))
    return _fill(arch, embed, found, limit, objective, align)


def _step_up(
    found: dict[Choice, int], losses: BlockLosses, saved: Mapping[Choice, Mapping[int, int]], room: int
) -> None:
    """Take single levels back while they fit, those that gain most for their cost first."""
    while True:
        best: tuple[float, Choice, int] | None = None
        for choice, width in found.items():
            for wider, loss in losses.losses[choice].items():
                price = saved[choice][width] - saved[choice][wider]
                gain = losses.losses[choice][width] - loss
                if wider > width and 0 < price <= room and gain > 0 and (best is None or gain / price > best[0]):
                    best = gain / price, choice, wider
        if best is None:
            return
        _, choice, wider = best
        room -= saved[choice][found[choice]] - saved[choice][wider]
        found[choice] = wider


def _fill(arch: Arch, embed: Embed, found: dict[Choice, int], limit: int, objective: Objective, align: int) -> Widths:
    """Spend what is left on MLP units, then on ranks and reduced maps, in the finest steps, evenly over blocks."""
    for space in ("mlp", "v", "qk", "sr"):
        moved = True
        while moved:
            moved = False
            for choice in [choice for choice in found if choice[1] == space]:
                block = arch.blocks[choice[0]]
                wider = min(found[choice] + align, getattr(block, space))
                if wider > found[choice] and _objective_of(arch, embed, {**found, choice: wider}, objective) <= limit:
                    found[choice], moved = wider, True
    return _widths(arch, embed, found)


def _widths(arch: Arch, embed: Embed, found: Mapping[Choice, int]) -> Widths:
    blocks = tuple(
        BlockWidths(**{space: found.get((i, space)) for space in SPACES})  # type: ignore[arg-type]
        for i in range(arch.depth)
    )
    return Widths(embed=embed, blocks=blocks)


def _objective_of(arch: Arch, embed: Embed, found: Mapping[Choice, int], objective: Objective) -> int:
    return objective(compressed_arch(arch, _widths(arch, embed, found)))
