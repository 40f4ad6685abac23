"""A factor of its own on the saliency of the units of every block, or of every stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunesweep.search.space.variables import Params, Variable

from .base import POSITIVE, Axis, Draft, Limits, ScoredSource

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["Weights"]


@dataclass(frozen=True, kw_only=True)
class Weights(Axis):
    """Variables ``NAME.I`` of every place I, all within the one range of the axis; at 1 by default.

    Args:
        place: ``blocks`` or ``stages``.
        kinds: of units (``pruners.scores``) that a factor is on.
    """

    place: str = "blocks"
    kinds: tuple[str, ...]
    default: tuple[float, float] = (1.0, 1.0)
    log: bool = True
    limits: Limits | None = POSITIVE
    neutral: float | None = 1.0
    encoding: str | None = "full"

    def check(self, table: SpaceTable) -> None:
        """The two encodings do not mix."""
        if table.encoding != self.encoding and getattr(table, self.name) != (1, 1):
            raise ValueError(f"{self.name}: belongs to encoding 'full'")

    def variables(self, table: SpaceTable, source: ScoredSource) -> tuple[Variable, ...]:
        """One for every place; none where the range is the neutral value alone."""
        low, high = getattr(table, self.name)
        if low == high == self.neutral:
            return ()
        count = source.arch.depth if self.place == "blocks" else len(source.arch.stages)
        one = self.place.removesuffix("s")
        return tuple(
            Variable(f"{self.name}.{i}", f"{self.meaning} of {one} {i}", low, high, log=True) for i in range(count)
        )

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Weigh the saliency of the units of every place."""
        weights = (
            (f"{self.place}.{variable.rpartition('.')[2]}.{kind}", float(value))
            for variable, value in point.items()
            if variable.startswith(f"{self.name}.")
            for kind in self.kinds
        )
        return dataclasses.replace(draft, weights=(*draft.weights, *weights))
