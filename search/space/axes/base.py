"""What a search variable is: its range in ``[space]``, its meaning, and what it does to a decision.

An axis is one object, of ``Axis`` or of a subclass that overrides what the axis needs; ``axes.register`` adds it to the
table ``AXES``, from which the keys of ``[space]``, the variables that samplers see, the scores that are made before a
search, decoding and the points that a search starts from all follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from prunesweep.models import Arch
from prunesweep.pruners import Scores
from prunesweep.pruners.scores import DEPTH, LEARNED, TOKENS
from prunesweep.search.space.variables import Params, Variable

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable
    from prunesweep.training import Recipe

__all__ = ["DEPTH", "LEARNED", "NATURAL", "POSITIVE", "SHARE", "TOKENS", "Axis", "Draft", "Limits", "ScoredSource"]


@dataclass(frozen=True)
class Limits:
    """What a range [low, high] must satisfy, and how an error message says it."""

    text: str
    allow: Callable[[float, float], bool]


SHARE = Limits("must lie in (0, 1]", lambda low, high: 0 < low <= high <= 1)
NATURAL = Limits("must be at least 0", lambda low, _: low >= 0)
POSITIVE = Limits("must be above 0", lambda low, _: low > 0)


@dataclass(frozen=True)
class Draft:
    """What a point decides before widths are cut to its budget. Points with equal drafts share one path of widths."""

    method: str = ""  # the width method whose scores order the units
    dropped: frozenset[int] = frozenset()  # blocks
    mixers: tuple[tuple[int, str], ...] = ()  # of the kept blocks whose mixer is not attention, ascending
    without_mlp: frozenset[int] = frozenset()  # kept blocks whose MLP is dropped
    keep_rate: float = 1.0  # share of patches kept inside merging blocks
    merge_start: int = 0  # first block that merges tokens
    # factors on the saliency of units, by kind ("mlp"), place ("blocks.3", "stages.0") or vector ("blocks.3.mlp")
    weights: tuple[tuple[str, float], ...] = ()

    def kept(self, depth: int) -> list[int]:
        """Blocks that are not dropped, of ``depth`` in all."""
        return [i for i in range(depth) if i not in self.dropped]

    def weight(self, vector: str) -> float:
        """The product of all factors on a vector of scores."""
        place, _, kind = vector.rpartition(".")
        return math.prod(factor for name, factor in self.weights if name in (kind, place, vector))


@dataclass(frozen=True)
class ScoredSource:
    """The source model's record and its scores by name: what an axis may read when it decides."""

    arch: Arch
    scores: Mapping[str, Scores]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of numbers that a search varies.

    Args:
        name: key in ``[space]``, and name of the variable.
        meaning: one line for people, shown with the space.
        default: the range [low, high] where the configuration names none; low = high fixes the variable.
        whole: values are integers.
        log: values are drawn on a logarithmic scale.
        limits: what the range must satisfy.
        neutral: the value that leaves the source as it is; None where there is no such value.
        alone: a search first looks along this axis with all others at their neutral values.
        changes_cost: cost depends on it beside the budget, so both of its ends count for what can be reached, and it
            gives back what it saves beyond a budget.
        encoding: the only encoding of the space that has it; None for all.
        of_blocks: it chooses blocks. Samplers see these variables last; a seed's proposals depend on the order.
        trains: it changes finetuning (``recipe``) and not the architecture.
    """

    name: str
    meaning: str
    default: tuple[float, float] = (0.0, 0.0)
    whole: bool = False
    log: bool = False
    limits: Limits | None = None
    neutral: float | None = None
    alone: bool = False
    changes_cost: bool = False
    encoding: str | None = None
    of_blocks: bool = False
    trains: bool = False

    def fields(self) -> dict[str, tuple[Any, Any]]:
        """Keys in ``[space]``: their types and defaults, in pydantic's terms."""
        return {self.name: (tuple[int, int] if self.whole else tuple[float, float], self.default)}

    def check(self, table: SpaceTable) -> None:
        """Raise ValueError for values of ``table`` that contradict each other or ``limits``."""

    def idle(self, table: SpaceTable) -> str:
        """Return why a part of the range does nothing, and what to do; empty where all of it does something.

        It is asked before a search starts; runs that were made are resumed as they are.
        """
        return ""

    def fit(self, table: SpaceTable, arch: Arch) -> None:
        """Raise UserError for a range that a source with this record cannot have."""

    def needs(self, table: SpaceTable, method: str) -> tuple[str, ...]:
        """Names of the scores of the source that the axis reads. ``method`` is the default width method."""
        return ()

    def blank(self, name: str, arch: Arch) -> Scores:
        """Scores of name ``name``, one of ``needs``, that prefer nothing: for costs before anything is scored."""
        raise NotImplementedError(f"{self.name} reads {name} and says nothing of blank ones")

    def variables(self, table: SpaceTable, source: ScoredSource) -> tuple[Variable, ...]:
        """What samplers see of the axis, fixed variables too."""
        low, high = getattr(table, self.name)
        return (Variable(self.name, self.meaning, low, high, whole=self.whole, log=self.log),)

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """``draft`` with what ``point`` says of this axis; axes are applied in the order of ``AXES``."""
        return draft

    def recipe(self, recipe: Recipe, value: Any) -> Recipe:
        """``recipe`` with what a value of this axis changes in finetuning."""
        return recipe

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """Values, by variable, that do to ``target`` what a published architecture ``arch`` did to ``dense``.

        They need not lie in the ranges: the nearest allowed values are taken. Variables that are not named get
        their neutral value, or the middle of their range.
        """
        return {}

    def beside(self, value: float) -> Mapping[str, float]:
        """Values of other variables that go with ``value`` where a search looks along this axis alone."""
        return {}

    def prior(self, arch: Arch, random: Random) -> Params:
        """Values of this axis's variables drawn from what searches usually find; none where all are as likely."""
        return {}
