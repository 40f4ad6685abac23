"""Let candidates of some regions fail."""

from __future__ import annotations

import math

import numpy as np

from .base import Floats, Point, Problem, Wrapped

__all__ = ["Infeasible"]

BALLS, SAMPLE, SHARE = 12, 400, 1 / 3


class Infeasible(Wrapped):
    """A third of random candidates, those in balls of the unit cube, have no quality, as where training diverges.

    The front lies outside the balls. Where the failures are is not known before.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem, seed)
        best = self.encoder.features(self.encoder.rows(list(self.best())))
        some = self.encoder.features(self.encoder.random(self.random, SAMPLE))
        room = _distances(some, best).min(1)
        farthest = np.argsort(-room, kind="stable")[: SAMPLE // 4]
        balls = self.random.permutation(farthest)[:BALLS]
        self._centres, self._radii = some[balls], 0.95 * room[balls]
        self._radii *= min(1.0, float(np.quantile(self._depth(some), SHARE)))

    def _depth(self, places: Floats) -> Floats:
        """Return (n,) distances from the next centre, over the radius of its ball."""
        return np.asarray((_distances(places, self._centres) / self._radii).min(1))

    def measured(self, point: Point, rung: int, number: int) -> float:
        place = self.encoder.features(self.encoder.rows([point]))
        return math.nan if self._depth(place)[0] < 1 else super().measured(point, rung, number)


def _distances(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.sqrt(((a[:, None] - b) ** 2).sum(2)))
