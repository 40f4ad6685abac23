"""Allocation of ranks and units to blocks: one-block losses propose, an exact cost decides.

The sums of one-block losses (``pruners.subspaces.block_losses``) are below the true loss but rank well, so for a given
residual width the levels of all blocks follow from

    minimise  sum_b,s loss_b,s(level)   subject to   cost(levels) <= budget

which is a multiple-choice knapsack: the lower convex hull by a multiplier found by bisection, then single steps up that
still fit. Costs are exact (``models.cost``) and add up over spaces once the residual width is given, but for PVTv2's
reduced maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prunesweep.models import Arch, cost

from .block_losses import SPACES, BlockLosses, Choice
from .widths import BlockWidths, Embed, Widths, compressed_arch

__all__ = ["allocate"]

Objective = Callable[[Arch], int]


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
        objective: the cost of a record, nearly additive over spaces.
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

    room = limit
    while True:
        low, high = 0.0, 1e-12
        while spent(chosen(high)) > room:
            low, high = high, high * 4
            if high > 1e6:
                return None
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(chosen(middle)) > room else (low, middle)
        found = chosen(high)
        _step_up(found, losses, saved, room - spent(found))
        over = _objective_of(arch, embed, found, objective) - limit
        if over <= 0:
            return _fill(arch, embed, found, limit, objective, align)
        room -= over  # a reduced map and what is read from it cost their product, so sums are not exact there


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
