"""Move where along their ranges variables matter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from optuna.distributions import FloatDistribution, IntDistribution

from .base import Point, Problem, Wrapped

__all__ = ["Shifted"]


class Shifted(Wrapped):
    """Numbers by a power of their place in the range, which keeps its ends; some of all numbers are mirrored.

    A plain shift would leave a part of the range behind. The budget stays.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        numbers = [
            name
            for name, d in self.distributions.items()
            if name != "budget" and isinstance(d, (FloatDistribution, IntDistribution))
        ]
        self._power = {n: float(np.exp(self.random.uniform(-0.8, 0.8))) for n in numbers}
        self._mirrored = {n: bool(self.random.random() < 0.5) for n in numbers}

    def inward(self, point: Point) -> Point:
        return self._moved(point, self._power, mirror_first=True)

    def outward(self, point: Point) -> Point:
        return self._moved(point, {n: 1 / p for n, p in self._power.items()}, mirror_first=False)

    def _moved(self, point: Point, power: Mapping[str, float], *, mirror_first: bool) -> Point:
        row = self.encoder.rows([point])[0]
        for v, name in enumerate(self.encoder.names):
            if name not in power:
                continue
            mirrored, place = self._mirrored[name], float(np.clip(row[v], 0, 1))
            place = 1 - place if mirrored and mirror_first else place
            if isinstance(self.distributions[name], FloatDistribution):
                place = place ** power[name]
            row[v] = 1 - place if mirrored and not mirror_first else place
        return {**self.encoder.point(row), "budget": point["budget"]}
