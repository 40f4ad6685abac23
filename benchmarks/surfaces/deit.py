"""The made-up response of a compressed DeiT-S (``benchmarks.surface``) as a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache

import numpy as np

from benchmarks.surface import BUDGET, KEEP, Choice, Surface
from prunesweep.search.proposals.budget_gp import log_error

from .base import Point, Problem

__all__ = ["DeitProblem"]


class DeitProblem(Problem):
    """Quality is the negated log error of top-1 after 27 epochs.

    Args:
        seed: another one is another surface.
    """

    def __init__(self, seed: int) -> None:
        self._surface = Surface(seed)
        self.distributions = self._surface.distributions
        self._decoded = lru_cache(maxsize=4096)(lambda items: self._surface.decode(dict(items)))

    def _choice(self, point: Point) -> Choice:
        return self._decoded(tuple(sorted(point.items())))

    def cost(self, point: Point) -> float:
        rows = np.array([astuple(self._choice(point))])
        return float(self._surface.macs(rows)[0] / self._surface.source_macs)

    def measured(self, point: Point, rung: int, number: int) -> float:
        top1 = self._surface.measure(self._choice(point), point["lr"], self.schedules[: rung + 1], number)
        return float(log_error(np.array([top1]))[0])

    def value(self, point: Point) -> float:
        top1 = self._surface.value(self._choice(point), point["lr"], self.schedules)
        return float(log_error(np.array([top1]))[0])

    def best(self) -> Sequence[Point]:
        _, macs, rows = self._surface.front(sum(self.schedules))
        found = []
        for spent, (_, skip, conv, conv3, keep, start) in zip(macs, rows.tolist(), strict=True):
            budget = max(float(np.nextafter(spent / self._surface.source_macs, 1)), BUDGET[0])
            own = {"skip": skip, "conv": conv, "conv3": conv3, "keep": KEEP[keep], "start": start}
            found.append({"budget": budget, **own, "lr": self._surface.best_lr(conv)})
        return found
