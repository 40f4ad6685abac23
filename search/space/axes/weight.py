"""A factor on the saliency of one kind of units: above 1 they are spared, below 1 they go before others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from prunesweep.search.space.variables import Params

from .base import POSITIVE, Axis, Draft, Limits, ScoredSource

__all__ = ["Weight"]


@dataclass(frozen=True, kw_only=True)
class Weight(Axis):
    """Shifts what the budget takes from one kind of units to the others, or back; fixed at 1 by default.

    Only ratios of weights matter, so one kind needs none: values, with heads where a method scores those.

    Args:
        kind: of units (``pruners.scores``).
    """

    kind: str
    default: tuple[float, float] = (1.0, 1.0)
    log: bool = True
    limits: Limits | None = POSITIVE
    neutral: float | None = 1.0

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Weigh the saliency of the kind."""
        return dataclasses.replace(draft, weights=(*draft.weights, (self.kind, float(point[self.name]))))
