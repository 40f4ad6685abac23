"""Add noise to what a search measures."""

from __future__ import annotations

import numpy as np

from .base import Point, Problem, Wrapped

__all__ = ["Noisy"]


class Noisy(Wrapped):
    """Normal noise on every measurement; on the first rung three times as much as on the last.

    Args:
        problem: gets the noise.
        seed: of the noise.
        share: deviation on the last rung, over the range of the front's qualities.
    """

    def __init__(self, problem: Problem, seed: int, share: float = 0.05) -> None:
        super().__init__(problem, seed)
        self._seed, self._deviation = seed, share * float(np.ptp(problem.front[:, 0]))

    def measured(self, point: Point, rung: int, number: int) -> float:
        rungs = len(self.schedules)
        factor = 3.0 if rung < rungs - 1 else 1.0
        noise = np.random.default_rng([self._seed, number, rung, 3]).normal()
        return super().measured(point, rung, number) + factor * self._deviation * noise
