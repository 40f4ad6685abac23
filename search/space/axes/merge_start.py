"""The first block that merges tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunesweep.models import Arch
from prunesweep.search.space.variables import Params

from .base import NATURAL, Axis, Draft, ScoredSource
from .depth import check_depth

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "MergeStart"]


@dataclass(frozen=True, kw_only=True)
class MergeStart(Axis):
    """Blocks before it work on all tokens; it matters where ``keep_rate`` is below 1."""

    def idle(self, table: SpaceTable) -> str:
        """Without a ``keep_rate`` below 1, nothing merges."""
        if table.merge_start == (0, 0) or table.keep_rate[0] < 1:
            return ""
        return f"no tokens merge with space.keep_rate = {list(table.keep_rate)}; lower that, or drop merge_start"

    def fit(self, table: SpaceTable, arch: Arch) -> None:
        """It is one of the source's blocks."""
        check_depth(self.name, table, arch, arch.depth - 1)

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Set the block."""
        return dataclasses.replace(draft, merge_start=int(point[self.name]))

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """The first merging block, at the same relative depth."""
        first = min((block.src for block in arch.blocks if block.tokens is not None), default=0)
        return {self.name: round(target.depth / dense.depth * first)}


AXIS = MergeStart(
    name="merge_start",
    meaning="first block that merges tokens",
    default=(0, 0),
    whole=True,
    limits=NATURAL,
    neutral=0.0,
)
