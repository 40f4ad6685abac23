"""A slope over depth of the saliency of all units: above 0 late blocks are spared, below 0 early ones."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunesweep.search.space.variables import Params

from .base import Axis, Draft, ScoredSource

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "DepthSlope"]


@dataclass(frozen=True, kw_only=True)
class DepthSlope(Axis):
    """Factors exp(slope * (i / (L - 1) - 1/2)) on blocks i of L; a stage's channels have the mean of its blocks'."""

    def check(self, table: SpaceTable) -> None:
        """The two encodings do not mix."""
        if table.encoding != self.encoding and getattr(table, self.name) != (0, 0):
            raise ValueError(f"{self.name}: belongs to encoding 'compact'")

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Weigh the saliency of every block and stage by its place."""
        arch, slope, first = source.arch, float(point[self.name]), 0
        places = [i / max(arch.depth - 1, 1) - 0.5 for i in range(arch.depth)]
        weights = [(f"blocks.{i}", math.exp(slope * place)) for i, place in enumerate(places)]
        for s, stage in enumerate(arch.stages):
            own = places[first : first + len(stage.blocks)]
            first += len(stage.blocks)
            weights.append((f"stages.{s}", math.exp(slope * sum(own) / len(own))))
        return dataclasses.replace(draft, weights=(*draft.weights, *weights)) if slope else draft


AXIS = DepthSlope(
    name="depth_slope",
    meaning="logarithm of the last block's factor on saliency over the first one's",
    default=(0.0, 0.0),
    neutral=0.0,
    encoding="compact",
)
