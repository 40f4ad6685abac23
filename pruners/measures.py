"""What a budget is counted in: a cost of a record that adds up over its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunesweep.models import Arch, LatencyTable, UserError
from prunesweep.models.arch import Block, Stage
from prunesweep.models.counting import block_cost, outside_cost

__all__ = ["MACS", "PARAMS", "Measure", "latency"]


@dataclass(frozen=True)
class Measure:
    """A cost that adds up over blocks: ``outside`` of a record, and ``block`` of (record, stage, block)."""

    name: str
    outside: Callable[[Arch], float]
    block: Callable[[Arch, Stage, Block], float]

    def __call__(self, arch: Arch) -> float:
        """Cost of the whole record."""
        blocks = sum(self.block(arch, stage, block) for stage in arch.stages for block in stage.blocks)
        return self.outside(arch) + blocks


MACS = Measure("macs", lambda arch: outside_cost(arch).macs, lambda *block: block_cost(*block).macs)
PARAMS = Measure("params", lambda arch: outside_cost(arch).params, lambda *block: block_cost(*block).params)


def latency(table: LatencyTable, arch: Arch) -> Measure:
    """Make a measure of predicted milliseconds per batch, for cuts of ``arch``.

    A record outside the table's range has infinite cost, so it is never chosen.

    Args:
        table: measured latencies.
        arch: the record of the model that is cut.

    Raises:
        UserError: the table is one of other models, or does not cover ``arch`` itself.
    """
    table.predict(arch)

    def inside(predict: Callable[..., float]) -> Callable[..., float]:
        def cost(*at: Any) -> float:
            try:
                return predict(*at)
            except UserError:
                return math.inf

        return cost

    return Measure("latency_ms", inside(table.outside), inside(table.block))
