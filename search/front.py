"""The Pareto front of two objectives, top-1 accuracy up and MACs down, and its hypervolume."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

__all__ = ["hypervolume", "pareto_front"]


class Point(Protocol):
    """Anything with the two objectives."""

    @property
    def top1(self) -> float: ...
    @property
    def macs(self) -> int: ...


P = TypeVar("P", bound=Point)


def pareto_front(points: Iterable[P]) -> list[P]:
    """The points that no other point beats: none has at least the top-1 and at most the MACs, and one of them better.

    Ascending MACs. Of points with equal objectives the first one given stays.
    """
    front: list[P] = []
    for point in sorted(points, key=lambda p: (p.macs, -p.top1)):  # sorted is stable
        if not front or point.top1 > front[-1].top1:
            front.append(point)
    return front


def hypervolume(points: Sequence[Point], source_macs: int) -> float:
    """Share of the unit square that the points dominate, in [0, 1].

    The square's axes are top-1 / 100 and the saved share of the source's MACs; its worst corner is a model with the
    source's MACs and no correct answer. Points outside the square add nothing.
    """
    volume, best = 0.0, 0.0
    # from the most expensive to the cheapest, each step of the staircase is a rectangle
    front = [p for p in pareto_front(points) if p.macs < source_macs]
    for point in front:
        volume += (point.top1 / 100 - best) * (1 - point.macs / source_macs)
        best = point.top1 / 100
    return volume
