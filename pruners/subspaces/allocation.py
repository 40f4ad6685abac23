"""Allocation of ranks and units to blocks: one-block losses propose, an exact cost decides.

The sums of one-block losses (``pruners.subspaces.block_losses``) are below the true loss but rank well, so for a given
residual width the levels of all blocks follow from

    minimise  sum_b,s loss_b,s(level)   subject to   cost(levels) <= budget

which is a multiple-choice knapsack: the lower convex hull by a multiplier found by bisection, then single steps up that
still fit. MACs and parameters are exact (``models.cost``) and add up over spaces once the residual width is given, but
for PVTv2's reduced maps. Latency is predicted from a table (``models.latency``), whose blocks interpolate between
products of widths, so what a choice costs is always asked of the whole record before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prunesweep.models import Arch
from prunesweep.pruners.measures import MACS

from .block_losses import SPACES, BlockLosses, Choice
from .widths import BlockWidths, Embed, Widths, compressed_arch

__all__ = ["allocate"]

Objective = Callable[[Arch], float]
DEAREST = 1e30  # loss for a unit of cost, as a number


def allocate(
    arch: Arch,
    embed: Embed,
    losses: BlockLosses,
    limit: float,
    *,
    objective: Objective = MACS,
    align: int = 1,
) -> Widths | None:
    """Choose all ranks and units for a residual width, so that the small model costs at most ``limit``.

    Args:
        arch: the source's record.
        embed: residual widths of the small model.
        losses: of ``measure_losses``.
        limit: the largest cost, in the objective's unit.
        objective: the cost of a record, nearly additive over spaces; infinite where it is not known.
        align: units of the MLPs are filled up in steps of it.

    Returns:
        The widths, or None where even the smallest levels cost more.
    """
    full = _objective_of(arch, embed, {}, objective)
    if not math.isfinite(full):
        return None  # a latency table does not reach so far
    saved: dict[Choice, dict[int, float]] = {}
    levels: dict[Choice, dict[int, float]] = {}
    for choice, own in losses.losses.items():
        found = {width: full - _objective_of(arch, embed, {choice: width}, objective) for width in own}
        saved[choice] = {width: less for width, less in found.items() if math.isfinite(less)}
        levels[choice] = {width: own[width] for width in saved[choice]}

    def chosen(price: float) -> dict[Choice, int]:
        return {
            choice: min(own, key=lambda width: (own[width] - price * saved[choice][width], -width))
            for choice, own in levels.items()
        }

    def spent(widths: Mapping[Choice, int]) -> float:
        return full - sum(saved[choice][width] for choice, width in widths.items())

    room: float = limit
    while True:
        low, high = 0.0, 1e-12
        while spent(chosen(high)) > room:
            low, high = high, high * 4
            if high > DEAREST:
                return None
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(chosen(middle)) > room else (low, middle)
        taken = chosen(high)
        _step_up(taken, levels, saved, room - spent(taken))
        over = _objective_of(arch, embed, taken, objective) - limit
        if over <= 0:
            return _fill(arch, embed, taken, limit, objective, align)
        # sums are not exact where widths multiply: a reduced map and what is read from it, a block's part of a latency
        room = spent(taken) - max(over, 1e-6 * limit)


def _step_up(
    found: dict[Choice, int],
    levels: Mapping[Choice, Mapping[int, float]],
    saved: Mapping[Choice, Mapping[int, float]],
    room: float,
) -> None:
    """Take single levels back while they fit, those that gain most for their cost first."""
    while True:
        best: tuple[float, Choice, int] | None = None
        for choice, width in found.items():
            for wider, loss in levels[choice].items():
                price = saved[choice][width] - saved[choice][wider]
                gain = levels[choice][width] - loss
                if wider > width and 0 < price <= room and gain > 0 and (best is None or gain / price > best[0]):
                    best = gain / price, choice, wider
        if best is None:
            return
        _, choice, wider = best
        room -= saved[choice][found[choice]] - saved[choice][wider]
        found[choice] = wider


def _fill(arch: Arch, embed: Embed, found: dict[Choice, int], limit: float, objective: Objective, align: int) -> Widths:
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


def _objective_of(arch: Arch, embed: Embed, found: Mapping[Choice, int], objective: Objective) -> float:
    return objective(compressed_arch(arch, _widths(arch, embed, found)))
