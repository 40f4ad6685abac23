"""The end of a decision: from the last model above a budget to one that meets it.

The group that a rule would remove next may be worth many per cent of a small model. Where it takes too much, it is
passed over for the next ones that do not, by the same price, least saliency per unit of cost saved: whole groups as
long as they fit, then halves, quarters and single units, those of the residual stream last, because every layer has its
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .narrowing import Narrowing, place_of
from .ranked import Ranked
from .reached import TOLERANCE, meets
from .scores import kind_of

__all__ = ["Filled", "fill"]

UNITS = {
    "embed": "channel of the residual stream of stage {}",
    "heads": "head of block {}",
    "qk": "query/key channel of block {}",
    "v": "channel of the values or of the convolution of block {}",
    "dim": "channel of the heads of block {}",
    "mlp": "hidden unit of block {}",
    "sr": "channel of the reduced map of block {}",
    "tail": "channel of the words of band {}",
}


@dataclass(frozen=True)
class Filled:
    """Units gone by vector, the cost without them, and what keeps it from the budget (empty where nothing does)."""

    gone: Mapping[str, int]
    cost: float
    hindrance: str


def fill(model: Narrowing, ranked: Mapping[str, Ranked], gone: Mapping[str, int], budget: float) -> Filled:
    """Narrow a model that costs more than ``budget`` until it costs at most that, and hardly less.

    Args:
        model: as it is when ``gone`` is gone; it is narrowed in place.
        ranked: the vectors that may lose units.
        gone: number of units by vector.
        budget: in the unit of the model's measure.

    Returns:
        The decision. Its cost is infinite where nothing that can go brings the model within the budget.
    """
    filling = _Filling(model, ranked, {name: gone.get(name, 0) for name in ranked}, budget)
    filling.remove_whole_groups()
    filling.remove_parts([name for name in ranked if kind_of(name) != "embed"])
    filling.remove_parts(list(ranked))
    hindrance = "" if model.total <= budget else filling.remove_smallest()
    cost = model.total if model.total <= budget else math.inf
    return Filled(filling.gone, cost, "" if meets(cost, budget) else hindrance)


class _Filling:
    """A model on its way down to a budget."""

    def __init__(self, model: Narrowing, ranked: Mapping[str, Ranked], gone: dict[str, int], budget: float) -> None:
        self.model, self.ranked, self.gone, self.budget = model, ranked, gone, budget
        self.least = (1 - TOLERANCE) * budget

    def remove_whole_groups(self) -> None:
        """Remove the cheapest groups that do not take too much."""
        gains = {name: self._gain(name, own.group) for name, own in self.ranked.items()}
        while self.model.total > self.budget:
            room = self.model.total - self.least
            fitting = [name for name, gain in gains.items() if 0 < gain <= room]
            if not fitting:
                return
            name = min(fitting, key=lambda name: self._saliency(name, self.ranked[name].group) / gains[name])
            self._remove(name, self.ranked[name].group)
            for other in self.model.affected(name):
                if other in gains:
                    gains[other] = self._gain(other, self.ranked[other].group)

    def remove_parts(self, names: list[str]) -> None:
        """Remove the cheapest parts of groups; of every vector the largest part that does not take too much."""
        while self.model.total > self.budget:
            room = self.model.total - self.least
            best: tuple[float, str, int] | None = None
            for name in names:
                for size in self._parts(name):
                    if 0 < (gain := self._gain(name, size)) <= room:
                        price = self._saliency(name, size) / gain
                        best = min(best or (math.inf, "", 0), (price, name, size))
                        break
            if best is None:
                return
            self._remove(*best[1:])

    def remove_smallest(self) -> str:
        """Remove the part that takes least, which is too much, and say which it was."""
        gains = {name: self._gain(name, own.finest) for name, own in self.ranked.items()}
        gains = {name: gain for name, gain in gains.items() if gain > 0}
        if not gains:
            return ""
        name = min(gains, key=gains.__getitem__)
        size = self.ranked[name].finest
        self._remove(name, size)
        unit = UNITS[kind_of(name)].format(place_of(name))
        many = unit if size == 1 else unit.replace(" of ", "s of ", 1)
        whole = {kind_of(other) for other in self.ranked} - {kind_of(other) for other in gains}
        return f"the smallest step left, {size} {many}, is {gains[name] / self.budget:.1%} of the budget" + (
            f" (at their floors or kept whole: {', '.join(sorted(whole))})" if whole else ""
        )

    def _parts(self, name: str) -> Iterator[int]:
        own = self.ranked[name]
        size = own.group // 2
        while size > own.finest:
            yield size
            size //= 2
        if own.group:
            yield own.finest

    def _gain(self, name: str, units: int) -> float:
        """What the next ``units`` would save; 0 where they may not go."""
        if not units or self.gone[name] + units > self.ranked[name].most:
            return 0.0
        return self.model.gain(name, units)

    def _saliency(self, name: str, units: int) -> float:
        return self.ranked[name].saliency(self.gone[name], units)

    def _remove(self, name: str, units: int) -> None:
        self.model.remove(name, units)
        self.gone[name] += units
