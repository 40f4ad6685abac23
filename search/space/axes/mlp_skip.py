"""A bit for every block that drops its MLP, as mixer ``none`` drops its attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from prunesweep.models import Arch
from prunesweep.search.space.variables import Params, Variable

from .base import Axis, Draft, Limits, ScoredSource

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "MlpSkip"]


@dataclass(frozen=True, kw_only=True)
class MlpSkip(Axis):
    """Variables ``mlp_skip.I`` (1: the MLP of block I is dropped); [0, 0], which is the default, has none."""

    def check(self, table: SpaceTable) -> None:
        """The two encodings do not mix."""
        if table.encoding != self.encoding and getattr(table, self.name) != (0, 0):
            raise ValueError(f"{self.name}: belongs to encoding 'full'; 'compact' has halves")

    def variables(self, table: SpaceTable, source: ScoredSource) -> tuple[Variable, ...]:
        """A bit for every block, where MLPs may be dropped."""
        low, high = getattr(table, self.name)
        blocks = range(source.arch.depth) if high else ()
        return tuple(Variable(f"{self.name}.{i}", f"the MLP of block {i} is dropped", low, high, True) for i in blocks)

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Drop the MLPs whose bit is set; a block that has no attention either is dropped."""
        depth, mixers = source.arch.depth, dict(draft.mixers)
        without = {i for i in draft.kept(depth) if point.get(f"{self.name}.{i}") and source.arch.blocks[i].mlp}
        none = {i for i, mixer in mixers.items() if mixer == "none"}
        return without_halves(draft, none, without) if without else draft

    def prior(self, arch: Arch, random: Random) -> Params:
        """One of the MLPs, or none: what is left of a narrow one is cheap already."""
        gone = random.randrange(-arch.depth, arch.depth)
        return {f"{self.name}.{i}": int(i == gone) for i in range(arch.depth)}

    def published(self, arch: Arch, dense: Arch, target: Arch) -> dict[str, float | str]:
        """The published blocks without MLP; blocks are matched by their relative depth."""
        gone = {block.src for block in arch.blocks if not block.mlp}
        return {f"{self.name}.{i}": int(i * dense.depth // target.depth in gone) for i in range(target.depth)}


def without_halves(draft: Draft, attention: set[int], mlp: set[int]) -> Draft:
    """Drop attentions and MLPs of kept blocks, and the blocks that lose both.

    Args:
        draft: the decision so far.
        attention: blocks that have no mixer in the end.
        mlp: blocks that have no MLP in the end.
    """
    mixers = {**dict(draft.mixers), **dict.fromkeys(attention, "none")}
    return dataclasses.replace(
        draft,
        dropped=draft.dropped | (attention & mlp),
        mixers=tuple(sorted((i, mixer) for i, mixer in mixers.items() if i not in attention & mlp)),
        without_mlp=frozenset(mlp - attention),
    )


AXIS = MlpSkip(
    name="mlp_skip",
    meaning="whether MLPs may be dropped, a bit for every block",
    default=(0, 0),
    whole=True,
    limits=Limits("must be [0, 0] or [0, 1]", lambda low, high: (low, high) in ((0, 0), (0, 1))),
    neutral=0.0,
    changes_cost=True,
    encoding="full",
    of_blocks=True,
)
