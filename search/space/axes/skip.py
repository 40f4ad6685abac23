"""The number of blocks that are dropped, least important first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from prunesweep.models import Arch
from prunesweep.pruners import Scores, drop_order
from prunesweep.search.space.variables import Params

from .base import DEPTH, LEARNED, NATURAL, Axis, Draft, ScoredSource
from .depth import check_depth

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "Skip"]


@dataclass(frozen=True, kw_only=True)
class Skip(Axis):
    """Whole blocks go, in an order that is measured or learned before the search (``space.skip_order``)."""

    def fields(self) -> dict[str, tuple[Any, Any]]:
        """The range, and ``skip_order``: by leaving blocks out, or by the gates of a UVC run."""
        return {
            **super().fields(),
            "skip_order": (
                Annotated[
                    Literal["measured", "learned"],
                    Field(description="Which blocks go first: by leaving each out, or by the gates of a UVC run."),
                ],
                "measured",
            ),
        }

    def fit(self, table: SpaceTable, arch: Arch) -> None:
        """At least one block of every stage must stay."""
        check_depth(self.name, table, arch, arch.depth - len(arch.stages))

    def needs(self, table: SpaceTable, method: str) -> tuple[str, ...]:
        """The importance of blocks, where any may be dropped."""
        order = LEARNED if table.skip_order == "learned" else DEPTH
        return (order,) if table.skip[1] else ()

    def blank(self, name: str, arch: Arch) -> Scores:
        """Blocks in their order; the last one of every stage is never dropped."""
        depth = torch.arange(arch.depth, dtype=torch.float64)
        depth[torch.tensor([len(stage.blocks) for stage in arch.stages]).cumsum(0) - 1] = torch.inf
        return Scores({"depth": depth})

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Drop the least important blocks."""
        count, depth = int(point[self.name]), source.scores.get(DEPTH) or source.scores.get(LEARNED)
        order = drop_order(depth) if count and depth is not None else ()
        return dataclasses.replace(draft, dropped=frozenset(order[:count]))

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """As many blocks, in proportion to the depth."""
        return {self.name: round(target.depth / dense.depth * (dense.depth - arch.depth))}


AXIS = Skip(
    name="skip",
    meaning="blocks dropped, least important first",
    default=(0, 0),
    whole=True,
    limits=NATURAL,
    neutral=0.0,
    alone=True,
    changes_cost=True,
    encoding="compact",
    of_blocks=True,
)
