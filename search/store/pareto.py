"""Pareto ranks, spread and hypervolume for any number of objectives.

Everything here minimises: ``losses`` are (n, m), one row per point and one column per objective; ``as_losses`` turns
values of mixed directions into them.

Sources: non-dominated sorting and crowding distance, Deb et al. 2002 (NSGA-II), section III; hypervolume by slicing,
While et al. 2006 (HSO).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Direction", "as_losses", "crowding_distance", "fronts", "hypervolume", "non_dominated"]

Direction: TypeAlias = Literal["maximize", "minimize"]
Floats: TypeAlias = NDArray[np.float64]


def as_losses(values: ArrayLike, directions: Sequence[Direction]) -> Floats:
    """``values`` (n, m) with the objectives that are maximised negated; no rows make (0, m)."""
    signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in directions])
    return np.asarray(values, dtype=np.float64).reshape(-1, len(signs)) * signs


def non_dominated(losses: Floats) -> NDArray[np.bool_]:
    """(n,) whether no other point is at most as large in every objective and smaller in one; equal points all stay."""
    distinct, place = np.unique(losses, axis=0, return_inverse=True)
    # rows ascend lexicographically: nothing is dominated by a row after it
    if losses.shape[1] == 2:
        second = distinct[:, 1]
        before = np.minimum.accumulate(np.concatenate(([np.inf], second[:-1]))) if len(second) else second
        return np.asarray((second < before)[place.reshape(-1)])
    stays = np.zeros(len(distinct), dtype=bool)
    alive = np.arange(len(distinct))
    while len(alive):
        first, rest = alive[0], alive[1:]
        stays[first] = True
        alive = rest[(distinct[rest] < distinct[first]).any(axis=1)]
    return np.asarray(stays[place.reshape(-1)])


def fronts(losses: Floats) -> Iterator[NDArray[np.intp]]:
    """Indices of the points of rank 0, 1, ...: each front is what nothing dominates once those before it are gone."""
    left = np.arange(len(losses))
    while len(left):
        best = non_dominated(losses[left])
        yield left[best]
        left = left[~best]


def crowding_distance(losses: Floats) -> Floats:
    """(n,) sum over the objectives of the gap between a point's two neighbours, over the points' range.

    Infinite for the first and the last point of an objective. An objective in which all are equal counts nothing.
    """
    distance = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]] if len(order) else 0.0
        if span > 0:
            distance[order[[0, -1]]] = np.inf
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance


def hypervolume(losses: Floats, reference: ArrayLike) -> float:
    """Volume that the points dominate below ``reference`` (m,); exact, points not below it add nothing.

    n log n for two objectives; each further one multiplies that by up to n.
    """
    corner = np.asarray(reference, dtype=np.float64)
    inside = losses[(losses < corner).all(axis=1)]
    return _volume(inside[non_dominated(inside)], corner)


def _volume(points: Floats, corner: Floats) -> float:
    if not len(points):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    depths = np.diff(points[:, -1], append=corner[-1])
    if len(corner) == 2:
        return float(depths @ (corner[0] - np.minimum.accumulate(points[:, 0])))
    slices = ((points[: i + 1, :-1], depth) for i, depth in enumerate(depths) if depth > 0)
    return sum(depth * _volume(flat[non_dominated(flat)], corner[:-1]) for flat, depth in slices)
