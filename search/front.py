"""The Pareto front of a search's results, for the objectives that it was asked for, and its hypervolume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from . import pareto
from .pareto import Direction, as_losses

__all__ = ["OBJECTIVES", "TWO", "directions", "hypervolume", "pareto_front", "values"]

OBJECTIVES: dict[str, Direction] = {
    "top1": "maximize",
    "macs": "minimize",
    "params": "minimize",
    "latency_ms": "minimize",
}
TWO = ("top1", "macs")  # what a search optimises unless it is told otherwise
P = TypeVar("P")


def directions(objectives: Sequence[str]) -> list[Direction]:
    return [OBJECTIVES[name] for name in objectives]


def values(point: Any, objectives: Sequence[str]) -> list[float]:
    """The objectives of anything that has them as attributes."""
    return [float(getattr(point, name)) for name in objectives]


def pareto_front(points: Iterable[P], objectives: Sequence[str] = TWO) -> list[P]:
    """The points that no other point beats: none is at least as good in every objective and better in one.

    Ascending in the first objective that is minimised. Of points with equal objectives the first one given stays.
    """
    found: dict[tuple[float, ...], P] = {}
    for point in points:
        found.setdefault(tuple(values(point, objectives)), point)
    if not found:
        return []
    losses = as_losses(list(found), directions(objectives))
    best = [
        (key, point) for (key, point), stays in zip(found.items(), pareto.non_dominated(losses), strict=True) if stays
    ]
    first = next(i for i, name in enumerate(objectives) if OBJECTIVES[name] == "minimize")
    return [point for _, point in sorted(best, key=lambda pair: pair[0][first])]


def hypervolume(points: Sequence[Any], source: Mapping[str, float], objectives: Sequence[str] = TWO) -> float:
    """Share of the unit cube that the points dominate, in [0, 1].

    The cube's axes are top-1 / 100 and the saved share of the source's MACs, parameters or latency; its worst corner is
    a model that costs what the source costs and gives no correct answer. Points outside the cube add nothing.
    """
    if not points:
        return 0.0
    scale = np.array([100.0 if name == "top1" else float(source[name]) for name in objectives])
    losses = as_losses(np.array([values(p, objectives) for p in points]) / scale, directions(objectives))
    corner = [0.0 if OBJECTIVES[name] == "maximize" else 1.0 for name in objectives]
    return pareto.hypervolume(losses, corner)
