"""Let most candidates look alike: at chance, equal, or without a number."""

from __future__ import annotations

import math

import numpy as np

from prunesweep.models import UserError

from .base import Point, Problem, Wrapped

__all__ = ["Degenerate"]

SAMPLE, CHANCE, DIVERGED = 200, 0.7, 0.05


class Degenerate(Wrapped):
    """On every rung the worst 70 % of random candidates are at chance, all equal, and one of twenty diverges."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        self._seed = seed
        points = [problem.placed(self.encoder.point(row)) for row in self.encoder.random(self.random, SAMPLE)]
        self._chance = [self._quantile(points, rung) for rung in range(len(self.schedules))]

    def _quantile(self, points: list[Point], rung: int) -> float:
        found = []
        for number, point in enumerate(points):
            try:
                found.append(self.problem.measured(point, rung, number))
            except UserError:
                continue
        return float(np.nanquantile(found, CHANCE))

    def measured(self, point: Point, rung: int, number: int) -> float:
        if np.random.default_rng([self._seed, number, 5]).random() < DIVERGED:
            return math.nan
        return max(super().measured(point, rung, number), self._chance[rung])
