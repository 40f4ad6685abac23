"""Test functions of black-box optimisation as a response: known optima, valleys, many local ones, rotated axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from .base import Floats, Point, Problem

__all__ = ["FunctionProblem"]

KINDS = ("sphere", "ellipsoid", "rosenbrock", "rastrigin")
NUMBERS, WHOLE, CHOICES = 4, (5, 8), ("a", "b", "c")
TREND, NOISE, LESS = 0.5, (0.15, 0.03), 1.5  # quality per log budget; deviation on the rungs; what the first one lacks


class FunctionProblem(Problem):
    """Quality is a trend of the budget less losses: a function of four numbers, a table per whole number and choice.

    The function's optimum moves along with the budget; there and at the best entries of the tables nothing is lost, so
    the front is the trend. The first rung's optimum lies elsewhere, and its tables are others, by a little.

    Args:
        kind: one of ``sphere``, ``ellipsoid`` (rotated, axes from 1 to 10), ``rosenbrock`` (rotated), ``rastrigin``.
        seed: of optimum, rotation, tables and noise.
    """

    margin = 2.0  # losses are larger than the front's range

    def __init__(self, kind: str, seed: int) -> None:
        assert kind in KINDS
        self._kind, self._seed = kind, seed
        rng = np.random.default_rng([seed, 7])
        self._optimum, self._drift = rng.uniform(0.3, 0.7, NUMBERS), rng.uniform(-0.3, 0.3, NUMBERS)
        self._bias = rng.normal(0, 0.08, NUMBERS)
        self._rotation = np.linalg.qr(rng.normal(size=(NUMBERS, NUMBERS)))[0]
        self._tables = [self._table(rng, size) for size in (*(n + 1 for n in WHOLE), len(CHOICES))]
        self._wrong = [np.abs(rng.normal(0, 0.15, len(table))) for table in self._tables]
        self.distributions = {
            "budget": FloatDistribution(0.1, 0.9),
            **{f"x{i}": FloatDistribution(0.0, 1.0) for i in range(NUMBERS)},
            **{f"n{i}": IntDistribution(0, high) for i, high in enumerate(WHOLE)},
            "choice": CategoricalDistribution(CHOICES),
        }

    @staticmethod
    def _table(rng: np.random.Generator, size: int) -> Floats:
        """Losses that rise from the best entry on to both sides; of few entries, in no order."""
        best = rng.integers(size)
        return np.asarray((np.abs(np.arange(size) - best) / size) ** 1.5 * rng.uniform(1, 3))

    def cost(self, point: Point) -> float:
        return float(point["budget"])

    def measured(self, point: Point, rung: int, number: int) -> float:
        noise = np.random.default_rng([self._seed, number, rung]).normal() * NOISE[rung]
        return self._quality(point, last=rung == len(self.schedules) - 1) + noise

    def value(self, point: Point) -> float:
        return self._quality(point, last=True)

    def best(self) -> Sequence[Point]:
        tables = [int(table.argmin()) for table in self._tables]
        fixed = {**{f"n{i}": entry for i, entry in enumerate(tables[:-1])}, "choice": CHOICES[tables[-1]]}
        return [
            {"budget": float(b), **{f"x{i}": float(x) for i, x in enumerate(self._centre(b))}, **fixed}
            for b in np.linspace(0.1, 0.9, 161)
        ]

    def _centre(self, budget: float) -> Floats:
        return np.asarray(self._optimum + self._drift * (budget - 0.5))

    def _quality(self, point: Point, *, last: bool) -> float:
        away = np.array([point[f"x{i}"] for i in range(NUMBERS)]) - self._centre(point["budget"])
        entries = [*(point[f"n{i}"] for i in range(len(WHOLE))), CHOICES.index(point["choice"])]
        lost = sum(float(table[entry]) for table, entry in zip(self._tables, entries, strict=True))
        if not last:
            away = away + self._bias
            lost += LESS + sum(float(wrong[entry]) for wrong, entry in zip(self._wrong, entries, strict=True))
        return TREND * math.log(point["budget"] / 0.9) - lost - self._function(away)

    def _function(self, away: Floats) -> float:
        """0 at the optimum, about 1 at an average distance from it."""
        turned = self._rotation @ away
        if self._kind == "sphere":
            return float(4 * away @ away)
        if self._kind == "ellipsoid":
            return float(1.2 * (turned**2) @ np.logspace(0, 1, NUMBERS))
        if self._kind == "rosenbrock":
            z = 2 * turned + 1
            return float(0.25 * np.log1p((10 * (z[1:] - z[:-1] ** 2) ** 2 + (1 - z[:-1]) ** 2).sum()))
        return float(4 * away @ away + 0.12 * (1 - np.cos(8 * np.pi * away)).sum())
