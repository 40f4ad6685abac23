"""Put the values of whole numbers and choices into another order."""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution, IntDistribution

from .base import Point, Problem, Wrapped

__all__ = ["Permuted"]


class Permuted(Wrapped):
    """Every whole number and choice names another value: neighbours say nothing of each other."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._other: dict[str, dict[object, object]] = {}
        for name, d in self.distributions.items():
            if isinstance(d, IntDistribution):
                values: list[object] = list(range(d.low, d.high + 1, d.step))
            elif isinstance(d, CategoricalDistribution):
                values = list(d.choices)
            else:
                continue
            order = self.random.permutation(len(values))
            self._other[name] = {value: values[i] for value, i in zip(values, order, strict=True)}
        self._back = {name: {inner: outer for outer, inner in own.items()} for name, own in self._other.items()}

    def inward(self, point: Point) -> Point:
        return {name: self._other[name][v] if name in self._other else v for name, v in point.items()}

    def outward(self, point: Point) -> Point:
        return {name: self._back[name][v] if name in self._back else v for name, v in point.items()}
