"""The Pareto front of a search's results, for the objectives that it was asked for, and its hypervolume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from prunesweep.search.store import pareto

from .pareto import Direction, as_losses

__all__ = ["OBJECTIVES", "QUALITIES", "TWO", "comparable", "directions", "hypervolume", "pareto_front", "values"]

OBJECTIVES: dict[str, Direction] = {
    "top1": "maximize",
    "ppl": "minimize",  # of language models
    "macs": "minimize",
    "params": "minimize",
    "latency_ms": "minimize",
}
QUALITIES = ("top1", "ppl")
TWO = ("top1", "macs")  # what a search optimises unless it is told otherwise
P = TypeVar("P")


def directions(objectives: Sequence[str]) -> list[Direction]:
    return [OBJECTIVES[name] for name in objectives]


def values(point: Any, objectives: Sequence[str]) -> list[float]:
    """The objectives of anything that has them as attributes."""
    return [float(getattr(point, name)) for name in objectives]


def comparable(given: Sequence[float], objectives: Sequence[str]) -> tuple[float, ...]:
    """Return values with those that are no finite numbers as infinitely bad: a comparison with NaN says nothing."""
    worst = {"maximize": -math.inf, "minimize": math.inf}
    return tuple(
        value if math.isfinite(value) else worst[direction]
        for value, direction in zip(given, directions(objectives), strict=True)
    )


def pareto_front(points: Iterable[P], objectives: Sequence[str] = TWO) -> list[P]:
    """The points that no other point beats: none is at least as good in every objective and better in one.

    Ascending in the first objective that is a cost. Of points with equal objectives the first one given stays. A point
    that has an objective which is not a finite number is left out.
    """
    found: dict[tuple[float, ...], P] = {}
    for point in points:
        if all(map(math.isfinite, key := tuple(values(point, objectives)))):
            found.setdefault(key, point)
    if not found:
        return []
    losses = as_losses(list(found), directions(objectives))
    best = [
        (key, point) for (key, point), stays in zip(found.items(), pareto.non_dominated(losses), strict=True) if stays
    ]
    first = next(i for i, name in enumerate(objectives) if name not in QUALITIES)
    return [point for _, point in sorted(best, key=lambda pair: pair[0][first])]


def hypervolume(points: Sequence[Any], source: Mapping[str, float], objectives: Sequence[str] = TWO) -> float:
    """Share of the unit cube that the points dominate, in [0, 1].

    The cube's axes are top-1 / 100 and the saved share of the source's MACs, parameters or latency; its worst corner is
    a model that costs what the source costs and gives no correct answer. Points outside the cube add nothing. The axis
    of a perplexity is the source's over it, at most 1.
    """
    if not points:
        return 0.0
    columns = zip(objectives, np.array([values(p, objectives) for p in points]).T, strict=True)
    losses = np.column_stack([_loss(name, column, source) for name, column in columns])
    corner = [0.0 if name in QUALITIES else 1.0 for name in objectives]
    return pareto.hypervolume(losses, corner)


def _loss(name: str, found: pareto.Floats, source: Mapping[str, float]) -> pareto.Floats:
    """A column of values as shares of the cube's axis, so that less is better."""
    if name == "top1":
        return -found / 100
    return -np.minimum(source["ppl"] / found, 1) if name == "ppl" else found / float(source[name])
