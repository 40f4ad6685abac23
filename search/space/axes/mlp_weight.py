"""A factor on the saliency of MLP units: above 1 they are spared, below 1 they go before units of attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from prunesweep.search.space.variables import Params

from .base import POSITIVE, Axis, Draft, ScoredSource

__all__ = ["AXIS", "MlpWeight"]


@dataclass(frozen=True, kw_only=True)
class MlpWeight(Axis):
    """Shifts what the budget takes from MLPs to attention, or back."""

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Weigh the saliency of MLP units."""
        return dataclasses.replace(draft, weights=(*draft.weights, ("mlp", float(point[self.name]))))


AXIS = MlpWeight(
    name="mlp_weight",
    meaning="factor on the saliency of MLP units (log scale)",
    default=(1.0, 1.0),
    log=True,
    limits=POSITIVE,
    neutral=1.0,
)
