"""Let numbers take a few values only."""

from __future__ import annotations

import numpy as np
from optuna.distributions import FloatDistribution, IntDistribution

from prunesweep.search.proposals.encoder import SearchSpaceEncoder

from .base import Point, Problem, Wrapped

__all__ = ["Discretised"]


class Discretised(Wrapped):
    """Numbers without a step, but for the budget, become whole numbers of ``levels`` values, evenly over their range.

    The front is the best known one: that of the inner problem, moved to the nearest values.
    """

    def __init__(self, problem: Problem, seed: int, levels: int = 9) -> None:
        super().__init__(problem, seed)
        self._last = levels - 1
        coarse = {n: d for n, d in problem.distributions.items() if n != "budget" and isinstance(d, FloatDistribution)}
        self._coarse = SearchSpaceEncoder(coarse)
        grid = IntDistribution(0, self._last)
        self.distributions = {name: grid if name in coarse else d for name, d in problem.distributions.items()}

    def inward(self, point: Point) -> Point:
        row = np.array([point[name] for name in self._coarse.names]) / self._last
        return {**point, **self._coarse.point(row)}

    def outward(self, point: Point) -> Point:
        row = np.round(self._coarse.rows([point])[0] * self._last)
        return {**point, **dict(zip(self._coarse.names, map(int, row), strict=True))}
