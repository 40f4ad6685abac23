"""Where to look next, for a search that knows what a candidate costs before it is trained.

A sampler for two objectives has to learn both. Costs need no learning: here a budget is fixed first, evenly over the
window, and one objective is left, the quality at that budget on the highest rung. A Gaussian process learns it from the
results of all rungs at once (``gaussian_process``); proposed is the point with the highest upper confidence bound among
random ones and mutations of the best known at about that budget (``benchmarks/search_quality.py`` compares this with
other ways).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from torch import Tensor

from prunesweep.search.store.run import Result

from .gaussian_process import GaussianProcess, Observations, learn

__all__ = ["EXPLORE", "GOLDEN", "Cube", "propose", "standardised"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXPLORE = 8  # one of so many proposals is random
CROWD = 64  # proposals whose candidates may be running
GOLDEN = (5**0.5 - 1) / 2  # steps that cover an interval evenly, however many there are
FEW = 5  # a rung with fewer results is not learned from: their spread says nothing yet
MOST, LEARN = 200, 100  # results that a proposal learns from, and those that its hyperparameters are learned from
REFIT = 8  # hyperparameters are learned anew once there are one in so many more candidates
OUTLIER = 4.0  # spreads of a rung; how much worse than that a ruined candidate is does not matter
TRACE = 0.05  # of a mutation's step
ROUNDS, WIDE, LOCAL, BEST = 5, 200, 100, 10  # of the local search: first and later points, and those mutated


class Cube:
    """A search's variables as a unit cube: a point is a row with one column per variable.

    A column runs from 0 to 1 over the range, on its logarithm where the variable is drawn so; whole numbers lie on a
    grid; of a categorical variable it is the place of the choice.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self.names, self._each = list(distributions), list(distributions.values())
        self.choices = [len(d.choices) if isinstance(d, CategoricalDistribution) else 0 for d in self._each]
        self._steps = [d.high - d.low if isinstance(d, IntDistribution) else 0 for d in self._each]
        self.groups = [v for v, choices in enumerate(self.choices) for _ in range(max(choices, 1))]  # of the features

    def rows(self, points: Sequence[Mapping[str, float | int | str]]) -> Floats:
        """(n, V) rows of points."""
        found = np.zeros((len(points), len(self.names)))
        for v, (name, d) in enumerate(zip(self.names, self._each, strict=True)):
            given = [point[name] for point in points]
            if isinstance(d, CategoricalDistribution):
                found[:, v] = [d.choices.index(value) for value in given]
            else:
                low, high, log = _range(d)
                column = np.log(np.array(given, float)) if log else np.array(given, float)
                found[:, v] = (column - low) / (high - low) if high > low else 0.5
        return found

    def point(self, row: Floats) -> dict[str, float | int | str]:
        """The point of a row."""
        found: dict[str, float | int | str] = {}
        for name, d, value in zip(self.names, self._each, row.tolist(), strict=True):
            if isinstance(d, CategoricalDistribution):
                found[name] = d.choices[int(value)]  # type: ignore[assignment]  # ours are strings
                continue
            low, high, log = _range(d)
            number = low + value * (high - low)
            number = min(max(math.exp(number) if log else number, d.low), d.high)  # type: ignore[attr-defined]
            found[name] = round(number) if isinstance(d, IntDistribution) else number
        return found

    def features(self, rows: Floats) -> Floats:
        """(n, D) for a kernel: one column per number, one per choice; two choices lie 1 apart."""
        columns = [
            (rows[:, [v]] == np.arange(choices)) * 0.5**0.5 if choices else rows[:, [v]]
            for v, choices in enumerate(self.choices)
        ]
        return np.hstack(columns)

    def random(self, rng: np.random.Generator, count: int) -> Floats:
        """(count, V) rows, every value as likely as any other."""
        found = rng.random((count, len(self.names)))
        for v, (choices, steps) in enumerate(zip(self.choices, self._steps, strict=True)):
            if choices:
                found[:, v] = rng.integers(choices, size=count)
            elif steps:
                found[:, v] = rng.integers(steps + 1, size=count) / steps
        return found

    def mutated(self, rng: np.random.Generator, rows: Floats, free: Ints) -> Floats:
        """Rows, each with one or a few of the ``free`` variables changed: numbers a little, choices at will.

        The other numbers, if not whole, move by a trace: what differs in the budget alone may be one candidate.
        """
        count = len(rows)
        hit = rng.random(rows.shape) < 1.7 / len(free)
        hit[np.arange(count), rng.choice(free, count)] = True
        steps = rng.normal(size=rows.shape) * rng.choice([0.12, 0.03], size=(count, 1))
        anew, found = self.random(rng, count), rows.copy()
        for v in free:
            changed = anew[:, v]
            if grid := self._steps[v]:
                whole = np.maximum(np.round(abs(steps[:, v]) * grid), 1) / grid
                changed = np.clip(rows[:, v] + np.sign(steps[:, v]) * whole, 0, 1)
            elif not self.choices[v]:
                found[:, v] = _reflected(rows[:, v] + np.where(hit[:, v], 1, TRACE) * steps[:, v])
                continue
            found[:, v] = np.where(hit[:, v], changed, rows[:, v])
        return found


def _reflected(column: Floats) -> Floats:
    """Back into the unit interval; cut off, many would be equal."""
    return 1 - abs(1 - abs(column) % 2)


def _range(distribution: BaseDistribution) -> tuple[float, float, bool]:
    """Low, high and whether they are logarithms, of a range of numbers."""
    low, high, log = distribution.low, distribution.high, distribution.log  # type: ignore[attr-defined]
    return (math.log(low), math.log(high), True) if log else (float(low), float(high), False)


@dataclass(frozen=True)
class Known:
    """Results of all rungs that have enough of them, as arrays; (n,) each but ``rows``."""

    rows: Floats  # (n, V)
    rungs: Ints
    candidates: Ints
    values: Floats

    def some(self, places: Ints) -> Known:
        return Known(self.rows[places], self.rungs[places], self.candidates[places], self.values[places])


def propose(
    distributions: Mapping[str, BaseDistribution], results: Sequence[Result], number: int, seed: int
) -> dict[str, float | int | str]:
    """A point for the proposal of this number; the same for the same arguments.

    Args:
        distributions: the variables. Where ``budget`` is not among them, the quality alone is what counts.
        results: all that is known, of any rung.
        number: how many proposals there were before.
        seed: of the search.
    """
    rng = np.random.default_rng([seed, number])
    results = sorted(results, key=lambda r: (r.rung, r.trial))  # in whatever order they came in
    cube = Cube(distributions)
    budget = {cube.names.index("budget"): number * GOLDEN % 1} if "budget" in distributions else {}
    known = standardised(cube, results)
    candidates = len({result.trial for result in results})
    started = candidates >= 2 * len(distributions)
    crowded = number > 4 * candidates + CROWD  # most proposals were no new candidates: chance finds one sooner
    free = np.array([v for v in range(len(cube.names)) if v not in budget], dtype=np.int64)
    if crowded or not started or not len(known.rungs) or not len(free) or number % EXPLORE == EXPLORE - 1:
        return cube.point(_at(cube.random(rng, 1), budget)[0])
    known = known.some(_spread(known.rungs, MOST, _distance(known.rows, budget)))
    top = int(known.rungs.max())
    process = GaussianProcess(_observed(cube, known), _learned(cube, results, top + 1))
    near = _best_near(known, budget)
    rows = np.vstack(
        [cube.random(rng, WIDE // 2), cube.mutated(rng, near[rng.integers(len(near), size=WIDE // 2)], free)]
    )
    for _ in range(ROUNDS):
        rows = _at(rows, budget)
        mean, deviation = process.predict(cube.features(rows), top)
        best = rows[np.argsort(-(mean + deviation), kind="stable")[:BEST]]
        rows = np.vstack([best, cube.mutated(rng, best[rng.integers(len(best), size=LOCAL)], free)])
    return cube.point(best[0])


def _learned(cube: Cube, results: Sequence[Result], rungs: int) -> Tensor | None:
    """Hyperparameters, which is what takes time: learned anew only once there is an eighth more to learn them from."""
    trials = sorted({result.trial for result in results})
    settled = set(trials[: len(trials) - len(trials) % max(len(trials) // REFIT, 1)])
    known = standardised(cube, [result for result in results if result.trial in settled])
    if not len(known.rungs):
        return None
    order = np.random.default_rng(len(settled)).random(len(known.rungs))  # the same until they are learned anew
    some = _observed(cube, known.some(_spread(known.rungs, LEARN, order)))
    arrays = (some.inputs, some.rungs, some.candidates, some.values)
    return _learn(tuple(cube.groups), rungs, *(array.tobytes() for array in arrays))


@lru_cache(maxsize=8)
def _learn(
    groups: tuple[int, ...], rungs: int, inputs: bytes, of_rungs: bytes, candidates: bytes, values: bytes
) -> Tensor:
    """``learn``, remembered by the content of its arrays."""
    known = Observations(
        inputs=np.frombuffer(inputs).reshape(-1, len(groups)).copy(),
        groups=groups,
        rungs=np.frombuffer(of_rungs, np.int64).copy(),
        candidates=np.frombuffer(candidates, np.int64).copy(),
        values=np.frombuffer(values).copy(),
    )
    return learn(known, rungs)


def _observed(cube: Cube, known: Known) -> Observations:
    return Observations(cube.features(known.rows), cube.groups, known.rungs, known.candidates, known.values)


def standardised(cube: Cube, results: Sequence[Result]) -> Known:
    """What a model learns: the logarithm of error or perplexity, negated, by the median and the spread of its rung.

    Rungs with few results are left out. A rung's spread is at least that of the rung below: its candidates were chosen.
    """
    kept: list[Result] = []
    values: list[float] = []
    spread = 1e-6
    for rung in sorted({result.rung for result in results}):
        own = [result for result in results if result.rung == rung]
        if len(own) < FEW:
            continue
        quality = -np.log([max(100 - r.top1, 0.1) if r.ppl is None else r.ppl for r in own])
        low, middle, high = np.quantile(quality, (0.16, 0.5, 0.84))
        spread = max(spread, float(high - low) / 2)
        kept += own
        values += np.clip((quality - middle) / spread, -OUTLIER, OUTLIER).tolist()
    rows = cube.rows([{name: result.point[name] for name in cube.names} for result in kept])
    return Known(rows, np.array([r.rung for r in kept], int), np.array([r.trial for r in kept], int), np.array(values))


def _at(rows: Floats, fixed: Mapping[int, float]) -> Floats:
    """Rows with some columns replaced, in place."""
    for v, value in fixed.items():
        rows[:, v] = value
    return rows


def _distance(rows: Floats, fixed: Mapping[int, float]) -> Floats:
    return np.asarray(sum((abs(rows[:, v] - value) for v, value in fixed.items()), np.zeros(len(rows))))


def _spread(rungs: Ints, most: int, order: Floats) -> Ints:
    """Places of at most ``most`` results: a fair share of every rung, what a rung does not use to those below it."""
    found: list[int] = []
    present = sorted(set(rungs.tolist()), reverse=True)
    for i, rung in enumerate(present):
        own = np.flatnonzero(rungs == rung)
        own = own[np.argsort(order[own], kind="stable")]
        found += own[: (most - len(found)) // (len(present) - i)].tolist()
    return np.array(sorted(found), dtype=np.int64)


def _best_near(known: Known, budget: Mapping[int, float]) -> Floats:
    """Rows of the best of those results of the two highest rungs that are nearest to the budget."""
    found = []
    for rung in sorted(set(known.rungs.tolist()), reverse=True)[:2]:
        own = known.some(np.flatnonzero(known.rungs == rung))
        near = own.some(np.argsort(_distance(own.rows, budget), kind="stable")[: max(FEW, len(own.rungs) // 4)])
        found.append(near.rows[np.argsort(-near.values, kind="stable")[:FEW]])
    return np.vstack(found)
