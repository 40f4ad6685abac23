"""The search space: its variables, how a point becomes an architecture, and what can be said before any training.

Encoding ``compact``: ``budget`` (share of the source's MACs), ``skip`` (blocks dropped, in the order of their measured
importance) and ``lr`` of finetuning. Blocks go first; then width is cut, by the scores of the source, until the budget
is met from below. Decoding is a pure function of the point and the cached scores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from models import Arch, Cost, Cut, UserError, cost, cut_arch
from pruners import Scores, WidthPath, cheapest_first, drop_order, pruner, vector_sizes, width_path

from .config import SpaceTable

__all__ = ["Candidate", "Space", "Spread", "Summary"]

Params = Mapping[str, float | int]


@dataclass(frozen=True)
class Candidate:
    """A decoded point: the decision, the record it gives, and that record's exact cost."""

    decision: Cut
    arch: Arch
    cost: Cost


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest value of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        ordered = sorted(values)
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])


@dataclass(frozen=True)
class Summary:
    """What the space holds, from a sample of its points."""

    macs: Spread
    params: Spread
    architectures: int  # distinct ones that a point can decode to
    reachable: tuple[float, float]  # MACs of the narrowest and the widest architecture, over the source's
    feasible: float  # share of the sample whose budget can be reached
    points: tuple[Params, ...]  # the feasible sample


class Space:
    """Decodes points for one source model. Raises UserError where the table does not fit the source."""

    def __init__(self, table: SpaceTable, arch: Arch, widths: Scores, depth: Scores) -> None:
        if table.skip[1] >= arch.depth:
            raise UserError(f"space.skip = {list(table.skip)}: the source has {arch.depth} blocks; one must stay")
        self.table, self.arch, self.source_cost = table, arch, cost(arch)
        order = drop_order(depth)
        self.paths: dict[int, WidthPath] = {
            skip: width_path(arch, widths, dropped=order[:skip], groups=table.group_sizes)
            for skip in range(table.skip[0], table.skip[1] + 1)
        }

    @classmethod
    def check(cls, table: SpaceTable, arch: Arch, method: str) -> None:
        """Raise UserError where no point of ``table`` can meet its budget; needs no scores, only the floors count."""
        pruner(method).check(method, arch)
        if pruner(method).decide is not cheapest_first:
            raise UserError(
                f"scores.method = {method!r}: decides by ratios, not along one path of budgets; use 'taylor'"
            )
        sizes = vector_sizes(arch, pruner(method).kinds)
        blank = Scores({name: torch.ones(size) for name, size in sizes.items()})
        space = cls(table, arch, blank, Scores({"depth": torch.arange(arch.depth)}))
        narrowest = space.reachable[0]
        if narrowest > table.budget[1]:
            raise UserError(
                f"space.budget = {list(table.budget)} cannot be met: the narrowest model still has {narrowest:.3f} of "
                "the source's MACs. Raise budget, raise skip, or set smaller space.groups"
            )

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's form of the variables."""
        return {
            "budget": FloatDistribution(*self.table.budget),
            "skip": IntDistribution(*self.table.skip),
            "lr": FloatDistribution(*self.table.lr, log=True),
        }

    def decode(self, point: Params) -> Candidate:
        """The candidate of a point. Raises UserError where its budget is below the narrowest architecture."""
        path = self.paths[int(point["skip"])]
        step = path.step_for(float(point["budget"]) * self.source_cost.macs)
        decision = path.cut(step)
        arch = cut_arch(self.arch, decision)
        return Candidate(decision, arch, cost(arch))

    @property
    def reachable(self) -> tuple[float, float]:
        """MACs of the narrowest architecture and of the widest within the window, over the source's."""
        macs = self.source_cost.macs
        high = self.table.budget[1] * macs
        widest = max(p.costs[p.step_for(high)] if p.costs[-1] <= high else 0 for p in self.paths.values())
        return min(p.costs[-1] for p in self.paths.values()) / macs, widest / macs

    def count_architectures(self) -> int:
        """Distinct widths that a budget inside the window selects, over all numbers of dropped blocks."""
        total, macs = 0, self.source_cost.macs
        for path in self.paths.values():
            if path.costs[-1] > self.table.budget[1] * macs:
                continue
            first = path.step_for(self.table.budget[1] * macs)
            last = path.step_for(max(self.table.budget[0] * macs, path.costs[-1]))
            total += last - first + 1
        return total

    def summarise(self, sample: int, seed: int) -> Summary:
        """Cost of ``sample`` points drawn uniformly over the variables, without those whose budget cannot be met."""
        random_ = random.Random(seed)
        drawn = [self._draw(random_) for _ in range(sample)]
        feasible = [p for p in drawn if self.paths[int(p["skip"])].costs[-1] <= p["budget"] * self.source_cost.macs]
        if not feasible:
            raise UserError(f"space: none of {sample} points can meet its budget. Raise budget[0] or skip[0]")
        costs = [self.decode(point).cost for point in feasible]
        return Summary(
            macs=Spread.of([c.macs for c in costs]),
            params=Spread.of([c.params for c in costs]),
            architectures=self.count_architectures(),
            reachable=self.reachable,
            feasible=len(feasible) / sample,
            points=tuple(feasible),
        )

    def _draw(self, random_: random.Random) -> Params:
        low, high = (math.log(lr) for lr in self.table.lr)
        return {
            "budget": random_.uniform(*self.table.budget),
            "skip": random_.randint(*self.table.skip),
            "lr": math.exp(random_.uniform(low, high)),
        }
