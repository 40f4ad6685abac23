"""The number of halves of blocks, attentions and MLPs, that are dropped, least important first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunesweep.models import Arch, UserError
from prunesweep.search.space.variables import Params

from .base import NATURAL, Axis, Draft, ScoredSource
from .mlp_skip import without_halves

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["ATTENTION", "AXIS", "Halves"]

ATTENTION = ("heads", "qk", "v", "attn", "sr")  # kinds of units


@dataclass(frozen=True, kw_only=True)
class Halves(Axis):
    """Halves go by the sum of the saliency of their units, as the width method scores it; every stage keeps a block."""

    def check(self, table: SpaceTable) -> None:
        """The two encodings do not mix."""
        if table.encoding != self.encoding and table.halves != (0, 0):
            raise ValueError("halves: belongs to encoding 'compact'; 'full' has mixer none and mlp_skip")

    def fit(self, table: SpaceTable, arch: Arch) -> None:
        """At least a half of every stage must stay."""
        most = 2 * arch.depth - len(arch.stages)
        if table.halves[1] > most:
            raise UserError(
                f"space.halves = {list(table.halves)}: the source has {arch.depth} blocks, so it must not exceed {most}"
            )

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Drop the least important halves of the blocks that are kept as they are."""
        attention, mlp, count = set[int](), set[int](), int(point[self.name])
        mixers = dict(draft.mixers)
        for i, own in _ordered(draft, source) if count else ():
            half, other = (attention, mlp) if own == "attention" else (mlp, attention)
            if i in mixers and own == "attention":
                continue
            alive = [j for j in _stage_of(source.arch, i) if j not in draft.dropped and j not in attention & mlp]
            if i in other and alive == [i]:
                continue
            half.add(i)
            if len(attention) + len(mlp) == count:
                break
        return without_halves(draft, attention, mlp) if attention or mlp else draft


def _ordered(draft: Draft, source: ScoredSource) -> Iterator[tuple[int, str]]:
    """Halves of kept blocks, the least important first."""
    vectors, found = source.scores[draft.method].vectors, list[tuple[float, int, str]]()
    for i in draft.kept(source.arch.depth):
        sums = {
            kind: float(v.sum()) for kind in (*ATTENTION, "mlp") if (v := vectors.get(f"blocks.{i}.{kind}")) is not None
        }
        if any(kind in sums for kind in ATTENTION):
            found.append((sum(sums.get(kind, 0.0) for kind in ATTENTION), i, "attention"))
        if "mlp" in sums:
            found.append((sums["mlp"], i, "mlp"))
    for _, i, own in sorted(found):
        yield i, own


def _stage_of(arch: Arch, i: int) -> range:
    """The blocks of the stage that a block is in."""
    first = 0
    for stage in arch.stages:
        if i < first + len(stage.blocks):
            break
        first += len(stage.blocks)
    return range(first, first + len(stage.blocks))


AXIS = Halves(
    name="halves",
    meaning="attentions and MLPs dropped, least important first",
    default=(0, 0),
    whole=True,
    limits=NATURAL,
    neutral=0.0,
    alone=True,
    changes_cost=True,
    encoding="compact",
    of_blocks=True,
)
