"""Compute the Pareto front of a search's results, for the objectives of the search, and its hypervolume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from prunesweep.search.store import pareto

from .pareto import Direction, as_losses

__all__ = [
    "OBJECTIVES",
    "QUALITIES",
    "TWO",
    "comparable",
    "directions",
    "hypervolume",
    "latest",
    "pareto_front",
    "quality_of",
    "values",
]

OBJECTIVES: dict[str, Direction] = {
    "top1": "maximize",
    "ppl": "minimize",  # of language models
    "agreement": "maximize",  # with the source's answers; needs no labels
    "macs": "minimize",
    "params": "minimize",
    "latency_ms": "minimize",
}
QUALITIES = ("top1", "ppl", "agreement")
TWO = ("top1", "macs")  # default objectives
P = TypeVar("P")


class _OnRung(Protocol):
    @property
    def trial(self) -> int: ...
    @property
    def rung(self) -> int: ...


R = TypeVar("R", bound=_OnRung)


def quality_of(objectives: Sequence[str]) -> str:
    """Return the objective that is a quality, not a cost."""
    return next(name for name in objectives if name in QUALITIES)


def directions(objectives: Sequence[str]) -> list[Direction]:
    """Return the direction of every objective."""
    return [OBJECTIVES[name] for name in objectives]


def values(point: Any, objectives: Sequence[str]) -> list[float]:
    """Return the objectives of a point.

    Args:
        point: anything that has the objectives as attributes.
        objectives: names in ``OBJECTIVES``.
    """
    return [float(getattr(point, name)) for name in objectives]


def comparable(given: Sequence[float], objectives: Sequence[str]) -> tuple[float, ...]:
    """Return values in which those that are not finite are infinitely bad, because NaN cannot be compared.

    Args:
        given: one value per objective.
        objectives: names in ``OBJECTIVES``.
    """
    worst = {"maximize": -math.inf, "minimize": math.inf}
    return tuple(
        value if math.isfinite(value) else worst[direction]
        for value, direction in zip(given, directions(objectives), strict=True)
    )


def latest(results: Iterable[R]) -> list[R]:
    """Return the result of every candidate on the highest rung that it reached, which is what the candidate is worth.

    What it gave on a rung below was measured on weights that further training has replaced, better or not.

    Args:
        results: anything with the attributes ``trial``, the candidate, and ``rung``.

    Returns:
        One result per candidate, in the order of their first ones.
    """
    found: dict[int, R] = {}
    for result in results:
        if result.trial not in found or found[result.trial].rung < result.rung:
            found[result.trial] = result
    return list(found.values())


def pareto_front(points: Iterable[P], objectives: Sequence[str] = TWO) -> list[P]:
    """Return the points that no other point dominates.

    A point dominates another one if it is at least as good in every objective and better in one. Of points with equal
    objectives the first one given stays. A point with an objective that is not finite is left out.

    Args:
        points: anything that has the objectives as attributes.
        objectives: names in ``OBJECTIVES``, one of them a cost.

    Returns:
        The points, ascending in the first objective that is a cost.
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
    """Return the share of the unit cube that the points dominate, in [0, 1].

    The cube's axes are top-1 / 100, or agreement / 100, and the saved share of the source's MACs, parameters or
    latency. Its worst corner is a model that costs what the source costs and gives no correct answer. Points outside
    the cube add nothing. The axis of a perplexity is the source's perplexity divided by it, at most 1.

    Args:
        points: anything that has the objectives as attributes.
        source: the source's costs, and its perplexity, by objective.
        objectives: names in ``OBJECTIVES``.
    """
    if not points:
        return 0.0
    columns = zip(objectives, np.array([values(p, objectives) for p in points]).T, strict=True)
    losses = np.column_stack([_loss(name, column, source) for name, column in columns])
    corner = [0.0 if name in QUALITIES else 1.0 for name in objectives]
    return pareto.hypervolume(losses, corner)


def _loss(name: str, found: pareto.Floats, source: Mapping[str, float]) -> pareto.Floats:
    """Return a column of values as shares of the cube's axis, where less is better."""
    if name in ("top1", "agreement"):
        return -found / 100
    return -np.minimum(source["ppl"] / found, 1) if name == "ppl" else found / float(source[name])
