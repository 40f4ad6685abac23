"""The number of 3x3 convolutions among those of ``conv``, which are its last ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunesweep.models import Arch
from prunesweep.search.space.variables import Params

from .base import NATURAL, Axis, Draft, ScoredSource

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "Conv3"]


@dataclass(frozen=True, kw_only=True)
class Conv3(Axis):
    """How many of the convolutions, counted from the last one back, are 3x3 and not 1x1."""

    def check(self, table: SpaceTable) -> None:
        """There cannot be more than ``conv`` allows."""
        if table.conv3[0] > table.conv[1]:
            raise ValueError(f"conv3 = {list(table.conv3)}: these are among the {table.conv[1]} of conv")

    def idle(self, table: SpaceTable) -> str:
        """There are no more than ``conv`` makes."""
        if table.conv3[1] <= table.conv[1]:
            return ""
        return f"these are among the convolutions of space.conv, of which there are {table.conv[1]} at most; lower it"

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Widen the last convolutions."""
        first = len(draft.mixers) - int(point[self.name])
        mixers = tuple((i, "conv3x3" if n >= first else mixer) for n, (i, mixer) in enumerate(draft.mixers))
        return dataclasses.replace(draft, mixers=mixers)

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """As many, in proportion to the depth."""
        found = [block.mixer for block in arch.blocks].count("conv3x3")
        return {self.name: round(target.depth / dense.depth * found)}


AXIS = Conv3(
    name="conv3",
    meaning="of these, 3x3 ones, the last ones",
    default=(0, 0),
    whole=True,
    limits=NATURAL,
    neutral=0.0,
    encoding="compact",
    of_blocks=True,
)
