"""Encode points of a search space as rows of a unit cube, for models of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

__all__ = ["SearchSpaceEncoder"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MUTATED = 1.7  # mean number of free variables that a mutation changes, besides one that it always changes
TRACE = 0.05  # share of a mutation's step


class SearchSpaceEncoder:
    """Encode the V variables of a search space as a unit cube: a point is a row with one column per variable.

    A column runs from 0 to 1 over the variable's range, on a logarithmic scale if the variable is drawn so. Numbers
    with a step lie on a grid. A categorical variable's column holds the index of the choice.

    Args:
        distributions: the variables by name.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self.space = dict(distributions)
        self.names, self._each = list(distributions), list(distributions.values())
        self.choices = [len(d.choices) if isinstance(d, CategoricalDistribution) else 0 for d in self._each]
        self._steps = [_steps(d) for d in self._each]
        self.groups = [v for v, choices in enumerate(self.choices) for _ in range(max(choices, 1))]  # one per feature

    def rows(self, points: Sequence[Mapping[str, Any]]) -> Floats:
        """Return (n, V) rows of points. A column is below 0 or above 1 if its value is outside the range."""
        found = np.zeros((len(points), len(self.names)))
        for v, (name, d) in enumerate(zip(self.names, self._each, strict=True)):
            given = [point[name] for point in points]
            if isinstance(d, CategoricalDistribution):
                found[:, v] = [d.choices.index(value) if value in d.choices else -1 for value in given]
            else:
                low, high, log = _range(d)
                column = np.log(np.array(given, float)) if log else np.array(given, float)
                found[:, v] = (column - low) / (high - low) if high > low else np.where(column == low, 0.5, -1)
        return found

    def partial_row(self, point: Mapping[str, Any]) -> Floats:
        """Return the (V,) row of a point that may lack variables, whose columns are NaN."""
        found = np.full(len(self.names), np.nan)
        for v, (name, d) in enumerate(zip(self.names, self._each, strict=True)):
            if name in point:
                found[v] = SearchSpaceEncoder({name: d}).rows([point])[0, 0]
        return found

    def inside(self, rows: Floats) -> NDArray[np.bool_]:
        """Return (n,) True for rows that lie in the space."""
        return np.asarray(((rows > -1e-9) & (rows < np.maximum(self.choices, 1) + 1e-9)).all(axis=1))

    def point(self, row: Floats) -> dict[str, Any]:
        """Return the point of a row, in Python's own types."""
        found: dict[str, Any] = {}
        for name, d, steps, value in zip(self.names, self._each, self._steps, row.tolist(), strict=True):
            if isinstance(d, CategoricalDistribution):
                found[name] = d.choices[int(value)]
                continue
            low, high, log = _range(d)
            number = low + value * (high - low)
            number = math.exp(number) if log else number
            if steps:
                number = d.low + round(value * steps) * d.step  # type: ignore[attr-defined]
            number = min(max(number, d.low), d.high)  # type: ignore[attr-defined]
            found[name] = round(number) if isinstance(d, IntDistribution) else float(number)
        return found

    def features(self, rows: Floats) -> Floats:
        """Return (n, D) features for a kernel: one per number, and one per choice, so that two choices lie 1 apart."""
        columns = [
            (rows[:, [v]] == np.arange(choices)) * 0.5**0.5 if choices else rows[:, [v]]
            for v, choices in enumerate(self.choices)
        ]
        return np.hstack(columns)

    def random(self, rng: np.random.Generator, count: int) -> Floats:
        """Draw (count, V) rows uniformly.

        Args:
            rng: the random numbers.
            count: number of rows.
        """
        found = rng.random((count, len(self.names)))
        for v, (choices, steps) in enumerate(zip(self.choices, self._steps, strict=True)):
            if choices:
                found[:, v] = rng.integers(choices, size=count)
            elif steps:
                found[:, v] = rng.integers(steps + 1, size=count) / steps
        return found

    def mutated(self, rng: np.random.Generator, rows: Floats, free: Ints, idle: Floats | None = None) -> Floats:
        """Return rows with one or a few of the ``free`` variables changed: numbers a little, choices at random.

        Numbers without a step that are not chosen move by a trace, because points that differ in the budget alone may
        be one candidate. Those at their idle values stay there: beside them even a trace may do something.

        Args:
            rng: the random numbers.
            rows: (n, V).
            free: indices of the variables that may change.
            idle: (V,) idle values, NaN where there is none.
        """
        count = len(rows)
        hit = rng.random(rows.shape) < MUTATED / len(free)
        hit[np.arange(count), rng.choice(free, count)] = True
        steps = rng.normal(size=rows.shape) * rng.choice([0.12, 0.03], size=(count, 1))
        anew, found = self.random(rng, count), rows.copy()
        for v in free:
            changed = anew[:, v]
            if grid := self._steps[v]:
                whole = np.maximum(np.round(abs(steps[:, v]) * grid), 1) / grid
                changed = np.clip(rows[:, v] + np.sign(steps[:, v]) * whole, 0, 1)
            elif not self.choices[v]:
                trace = TRACE if idle is None else np.where(abs(rows[:, v] - idle[v]) < 1e-9, 0, TRACE)
                found[:, v] = _reflected(rows[:, v] + np.where(hit[:, v], 1, trace) * steps[:, v])
                continue
            found[:, v] = np.where(hit[:, v], changed, rows[:, v])
        return found


def _steps(distribution: BaseDistribution) -> int:
    """Return the number of steps from low to high; 0 for choices, and if the values form no even grid."""
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return (distribution.high - distribution.low) // distribution.step
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return round((distribution.high - distribution.low) / distribution.step)
    return 0


def _reflected(column: Floats) -> Floats:
    """Return a column mirrored back into the unit interval; clipping would make many values equal."""
    return 1 - abs(1 - abs(column) % 2)


def _range(distribution: BaseDistribution) -> tuple[float, float, bool]:
    """Return low and high of a range of numbers, and whether they are logarithms."""
    low, high, log = distribution.low, distribution.high, distribution.log  # type: ignore[attr-defined]
    return (math.log(low), math.log(high), True) if log else (float(low), float(high), False)
