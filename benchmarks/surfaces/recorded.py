"""Real candidates of the digits example's space (``benchmarks.record_candidates``) as a problem, without a model.

Untrained candidates cost half an epoch of the source, trained ones three more. Between the recorded points a model
answers: nearest points would make steps, of which a sampler that proposes little changes sees none. It is a forest of
randomised trees, as in surrogate benchmarks (Eggensperger et al. 2015), on what a polynomial of the budget leaves: of
another kind than the Gaussian processes and densities that are compared on it. A trained candidate's quality is linear
in that of the untrained one and in log budget, and what this leaves is the noise of training.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm

from prunesweep.models import Arch
from prunesweep.search.config import load_config
from prunesweep.search.proposals.budget_gp import log_nats
from prunesweep.search.space.space import Space
from prunesweep.search.store.pareto import non_dominated

from .base import Floats, Point, Problem

__all__ = ["FOLDER", "RecordedProblem", "records"]

FOLDER = Path(__file__).parent / "digits"
CONFIG = Path(__file__).parents[2] / "examples" / "digits.toml"
DEGREE, TREES = 3, 50
DRAWS, ROUNDS, POINTS = 20_000, 6, 60  # of the search for the best known front, of which some points are kept


def records(path: Path) -> list[dict[str, float]]:
    """Read recorded candidates: variables and figures by name, without those that a candidate lacks."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@lru_cache(maxsize=1)
def digits_space() -> Space:
    """The example's space, where all scores are equal: what a candidate costs needs no others."""
    config = load_config(CONFIG)
    size = {"img_size": (8, 8), "in_chans": 1, "num_classes": 10}
    model = timm.create_model(config.source.model, **size, **config.source.args)
    return Space.blank(config.space, Arch.from_timm(model), config.scores.method, projected=True)


class RecordedProblem(Problem):
    """Quality is the negated logarithm of the KL to the source, in nats.

    Args:
        seed: of the recorded source.
    """

    schedules = (0.5, 3)
    reduction_factor = 4
    epochs = 90

    def __init__(self, seed: int) -> None:
        self._seed, self._space = seed, digits_space()
        self.distributions = self._space.distributions
        self.rows = records(FOLDER / f"seed{seed}.csv")
        self._placed = lru_cache(maxsize=4096)(lambda items: self._space.placed(dict(items)))
        self.fit(self.rows)

    def fit(self, rows: Sequence[Point]) -> None:
        """Fit what answers between the recorded points.

        Args:
            rows: the records to answer from.
        """
        from sklearn.ensemble import ExtraTreesRegressor

        inputs, quality = self.encoder.rows(self.points(rows)), log_nats(np.array([row["kl"] for row in rows]))
        self._trend = np.polynomial.Polynomial.fit(self._log_budget(inputs), quality, DEGREE)
        forest = ExtraTreesRegressor(TREES, min_samples_leaf=2, random_state=0)
        self._forest = forest.fit(inputs, quality - self._trend(self._log_budget(inputs)))
        trained = [row for row in rows if "trained_kl" in row]
        after = log_nats(np.array([row["trained_kl"] for row in trained]))
        columns = self._columns(
            log_nats(np.array([row["kl"] for row in trained])), self.encoder.rows(self.points(trained))
        )
        self._weights = np.linalg.lstsq(columns, after, rcond=None)[0]
        self.noise = float(np.std(after - columns @ self._weights, ddof=columns.shape[1]))

    def points(self, rows: Sequence[Point]) -> list[Point]:
        """Return the points of records, with whole numbers where the variable is one."""
        return [{n: type(d.low)(row[n]) for n, d in self.distributions.items()} for row in rows]  # type: ignore[attr-defined]

    def _log_budget(self, inputs: Floats) -> Floats:
        d: Any = self.distributions["budget"]
        return np.asarray(np.log(d.low + inputs[:, self.encoder.names.index("budget")] * (d.high - d.low)))

    def _columns(self, untrained: Floats, inputs: Floats) -> Floats:
        return np.column_stack([np.ones(len(inputs)), untrained, self._log_budget(inputs)])

    def untrained(self, inputs: Floats) -> Floats:
        """Return (n,) qualities of untrained candidates, from (n, V) encoded points."""
        return np.asarray(self._trend(self._log_budget(inputs)) + self._forest.predict(inputs))

    def trained(self, inputs: Floats) -> Floats:
        """Return (n,) qualities of trained candidates, without noise."""
        return np.asarray(self._columns(self.untrained(inputs), inputs) @ self._weights)

    def placed(self, point: Point) -> Point:
        return dict(self._placed(tuple(sorted(point.items()))))

    def cost(self, point: Point) -> float:
        return float(point["budget"])

    def measured(self, point: Point, rung: int, number: int) -> float:
        row = self.encoder.rows([point])
        if rung == 0:
            return float(self.untrained(row)[0])
        return float(self.trained(row)[0]) + self.noise * np.random.default_rng([self._seed, number, 1]).normal()

    def value(self, point: Point) -> float:
        return float(self.trained(self.encoder.rows([point]))[0])

    def best(self) -> Sequence[Point]:
        return self._best

    @cached_property
    def _best(self) -> list[Point]:
        """The front of random points, and of mutations of its points."""
        rng, encoder = np.random.default_rng(0), self.encoder
        rows = encoder.random(rng, DRAWS)
        for _ in range(ROUNDS):
            losses = np.column_stack([-self.trained(rows), rows[:, encoder.names.index("budget")]])
            front = rows[non_dominated(losses)]
            tries = encoder.mutated(rng, front[rng.integers(len(front), size=DRAWS // 4)], np.arange(front.shape[1]))
            rows = np.vstack([front, tries])
        front = front[np.argsort(front[:, encoder.names.index("budget")], kind="stable")]
        some = np.unique(np.linspace(0, len(front) - 1, POINTS).round().astype(int))
        # what cannot be built at its budget becomes something near that can
        return [self.placed(encoder.point(row)) for row in front[some]]
