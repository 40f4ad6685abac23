"""What a sampler is measured on: a space of known costs, and a quality that training brings nearer to the last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution

from prunesweep.search.proposals.encoder import SearchSpaceEncoder

__all__ = ["Floats", "Point", "Problem", "Wrapped"]

Point = Mapping[str, Any]
Floats = NDArray[np.float64]


class Problem(ABC):
    """A made-up or recorded search space with two objectives: quality, larger is better, and cost.

    One of the variables is ``budget``, the cost that a candidate may have at most.

    Attributes:
        distributions: the variables by name.
        schedules: epochs of the rungs; each goes on from the one before.
        reduction_factor: one of so many candidates of a rung is promoted.
        epochs: how far a search goes.
        margin: how far below the front's lowest quality the worst corner of hypervolumes lies, over the front's range.
    """

    distributions: Mapping[str, BaseDistribution]
    schedules: tuple[float, ...] = (3, 24)
    reduction_factor: float = 2
    epochs: float = 900
    margin: float = 0.1

    @abstractmethod
    def cost(self, point: Point) -> float:
        """Return a point's MACs over those of the source. Raises UserError where no candidate meets its budget."""

    @abstractmethod
    def measured(self, point: Point, rung: int, number: int) -> float:
        """Return the quality of candidate ``number`` as a search sees it on a rung; NaN where it has none."""

    @abstractmethod
    def value(self, point: Point) -> float:
        """Return the quality on the last rung, without noise."""

    @abstractmethod
    def best(self) -> Sequence[Point]:
        """Return the points of the true front, or of the best known one."""

    def placed(self, point: Point) -> Point:
        """Return the point that takes a proposal's place, whoever proposed it."""
        return point

    @cached_property
    def encoder(self) -> SearchSpaceEncoder:
        """The variables as a unit cube."""
        return SearchSpaceEncoder(self.distributions)

    @cached_property
    def front(self) -> Floats:
        """(n, 2) qualities and costs of ``best``."""
        return np.array([(self.value(point), self.cost(point)) for point in self.best()])


class Wrapped(Problem):
    """Another problem seen through ``inward``, a bijection of points; all else is that problem's."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.random = problem, np.random.default_rng([seed, 28])
        self.distributions, self.schedules = problem.distributions, problem.schedules
        self.reduction_factor, self.epochs, self.margin = problem.reduction_factor, problem.epochs, problem.margin

    def inward(self, point: Point) -> Point:
        """Return the inner problem's point of one of this problem."""
        return point

    def outward(self, point: Point) -> Point:
        """Return this problem's point of one of the inner problem."""
        return point

    def cost(self, point: Point) -> float:
        return self.problem.cost(self.inward(point))

    def measured(self, point: Point, rung: int, number: int) -> float:
        return self.problem.measured(self.inward(point), rung, number)

    def value(self, point: Point) -> float:
        return self.problem.value(self.inward(point))

    def best(self) -> Sequence[Point]:
        return [self.outward(point) for point in self.problem.best()]

    def placed(self, point: Point) -> Point:
        inner = self.inward(point)
        moved = self.problem.placed(inner)
        return point if moved is inner else self.outward(moved)
