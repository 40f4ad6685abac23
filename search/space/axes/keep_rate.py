"""The share of patches that merging blocks work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from prunesweep.models import Arch, Block
from prunesweep.pruners import Scores
from prunesweep.search.space.variables import Params

from .base import SHARE, TOKENS, Axis, Draft, ScoredSource
from .depth import check_family

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "KeepRate"]


@dataclass(frozen=True, kw_only=True)
class KeepRate(Axis):
    """Tokens are merged by plans of Prune-and-Merge, from block ``merge_start`` on; at 1 there are no plans."""

    def fields(self) -> dict[str, tuple[Any, Any]]:
        """The range, and ``prune_rate``: the share of patches that pass a merging block by."""
        return {
            **super().fields(),
            "prune_rate": (
                Annotated[float, Field(ge=0, lt=1, description="Share of patches that pass a merging block by.")],
                0.1,
            ),
        }

    def fit(self, table: SpaceTable, arch: Arch) -> None:
        """Tokens of the source's family can be merged."""
        check_family(self.name, table, arch, "tokens", 1)

    def needs(self, table: SpaceTable, method: str) -> tuple[str, ...]:
        """The importance of patches, where any may be merged."""
        return (TOKENS,) if table.keep_rate[0] < 1 else ()

    def blank(self, name: str, arch: Arch) -> Scores:
        """Patches from the first one on."""
        patches = arch.tokens - arch.prefix_tokens
        return Scores({f"blocks.{i}.tokens": torch.arange(1.0, patches + 1) for i in range(arch.depth)})

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Set the share; the plans themselves are made by ``Space``, once for all points that share them."""
        return dataclasses.replace(draft, keep_rate=float(point[self.name]))

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """The smallest share of patches that any block works on."""
        patches = dense.tokens - dense.prefix_tokens
        kept = [(_tokens(b) - dense.prefix_tokens) / patches for b in arch.blocks if b.tokens is not None]
        return {self.name: min(kept, default=1.0)}


def _tokens(block: Block) -> int:
    assert block.tokens is not None
    return block.tokens


AXIS = KeepRate(
    name="keep_rate",
    meaning="share of patches kept inside merging blocks; 1 plans no tokens",
    default=(1.0, 1.0),
    limits=SHARE,
    neutral=1.0,
    alone=True,
    changes_cost=True,
)
