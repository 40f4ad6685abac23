"""The number of blocks whose attention becomes a convolution, from the first kept block on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunesweep.models import Arch
from prunesweep.search.space.variables import Params

from .base import NATURAL, Axis, Draft, ScoredSource
from .depth import check_depth, check_family

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "Conv"]


@dataclass(frozen=True, kw_only=True)
class Conv(Axis):
    """A prefix of 1x1 convolutions, the form that SPViT's searches found (arXiv 2111.11802)."""

    def fit(self, table: SpaceTable, arch: Arch) -> None:
        """There are no more than the source's blocks, and attention of its family can become a convolution."""
        check_depth(self.name, table, arch, arch.depth)
        check_family(self.name, table, arch, "mixers", 0)

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Put 1x1 convolutions in the place of attention; ``conv3`` widens some of them."""
        blocks = draft.kept(source.arch.depth)[: int(point[self.name])]
        return dataclasses.replace(draft, mixers=tuple((i, "conv1x1") for i in blocks))

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """As many convolutions of any size, in proportion to the depth."""
        convs = [block for block in arch.blocks if block.mixer.startswith("conv")]
        return {self.name: math.ceil(target.depth / dense.depth * len(convs))}

    def beside(self, value: float) -> Mapping[str, float]:
        """Half of them are 3x3."""
        return {"conv3": int(value) // 2}


AXIS = Conv(
    name="conv",
    meaning="blocks whose attention becomes a convolution, from the first on",
    default=(0, 0),
    whole=True,
    limits=NATURAL,
    neutral=0.0,
    alone=True,
    changes_cost=True,
    encoding="compact",
    of_blocks=True,
)
