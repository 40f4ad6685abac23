"""Pareto ranks, crowding distance and hypervolume for any number of objectives.

All functions minimise: ``losses`` are (n, m), one row per point and one column per objective; ``as_losses`` turns
values of mixed directions into them.

Sources: non-dominated sorting and crowding distance, Deb et al. 2002 (NSGA-II), section III; hypervolume by slicing,
While et al. 2006 (HSO).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Direction", "as_losses", "crowding_distance", "fronts", "hypervolume", "non_dominated"]

Direction: TypeAlias = Literal["maximize", "minimize"]
Floats: TypeAlias = NDArray[np.float64]


def as_losses(values: ArrayLike, directions: Sequence[Direction]) -> Floats:
    """Return values with the objectives that are maximised negated, (n, m).

    Args:
        values: (n, m); no rows make (0, m).
        directions: (m,) directions of the objectives.
    """
    signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in directions])
    return np.asarray(values, dtype=np.float64).reshape(-1, len(signs)) * signs


def non_dominated(losses: Floats) -> NDArray[np.bool_]:
    """Return (n,) True for the points that no other point dominates.

    Point a dominates point b if a_k <= b_k for every objective k and a_k < b_k for one; equal points all stay.
    """
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
    """Yield the indices of the points of rank 0, 1, ...

    A front is the points that no other point dominates, once the fronts before it are removed. Two objectives take
    n log n steps for all of them.
    """
    if losses.shape[1] == 2:
        ranks = _ranks(losses)
        for rank in range(ranks.max(initial=-1) + 1):
            yield np.flatnonzero(ranks == rank)
        return
    left = np.arange(len(losses))
    while len(left):
        best = non_dominated(losses[left])
        yield left[best]
        left = left[~best]


def _ranks(losses: Floats) -> NDArray[np.intp]:
    """Return the (n,) numbers of the fronts of points with two objectives."""
    found = np.zeros(len(losses), dtype=np.intp)
    lowest = list[float]()  # the second loss of every front so far, which ascends: the first one has no smaller ones
    before, rank = None, 0
    for i in np.lexsort((losses[:, 1], losses[:, 0])):
        point = (losses[i, 0], losses[i, 1])
        if point != before:  # equal points share a front
            before, rank = point, bisect.bisect_right(lowest, point[1])
            lowest[rank : rank + 1] = [point[1]]
        found[i] = rank
    return found


def crowding_distance(losses: Floats) -> Floats:
    """Return the (n,) crowding distances of the points of a front.

        d_i = sum_k (f_k(i + 1) - f_k(i - 1)) / (max f_k - min f_k)

    where i - 1 and i + 1 are the neighbours of point i in objective k, whose losses are f_k. The first and the last
    point of an objective have an infinite distance. An objective in which all points are equal adds nothing.
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
    """Return the exact volume that the points dominate below a reference point.

    Points that are not below the reference add nothing. Two objectives take n log n steps; each further one multiplies
    that by up to n.

    Args:
        losses: (n, m).
        reference: (m,) worst corner of the volume.
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
