"""How much of the differences among candidates of about the same cost a variable explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunesweep.search.store.front import Ranking
from prunesweep.search.store.run import Result

__all__ = ["importance"]

FEW = 12  # candidates: of fewer, nothing is said
NEAR = 9  # candidates of about the same cost, among which one is ranked
GROUPS = 3  # of a variable's values


def importance(results: Sequence[Result], ranking: Ranking) -> dict[str, Any]:
    """Return what every variable explains on the highest rung that enough candidates have reached.

    A candidate's worth is its rank, by what the search compares by, among those of about the same cost. Of its variance
    the part that lies between low, middle and high values of a variable is shown, without what chance puts there
    (epsilon squared, Kelley 1935).

    Args:
        results: of all tasks.
        ranking: what candidates are compared by.

    Returns:
        ``rung``, ``candidates``, and ``shares``, pairs of a variable and its part in [0, 1], the largest first; rung
        None and no shares where no rung has enough candidates.
    """
    measured = [r for r in results if math.isfinite(ranking.goodness(r))]
    for rung in sorted({r.rung for r in measured}, reverse=True):
        own = sorted((r for r in measured if r.rung == rung), key=lambda r: r.macs)
        if len(own) < FEW:
            continue
        good = np.array([ranking.goodness(r) for r in own])
        ranks = np.array([_rank(good, place) for place in range(len(good))])
        names = [name for name in own[0].point if len({str(r.point.get(name)) for r in own}) > 1 and name != "budget"]
        shares = [(name, _explained(_groups([r.point.get(name) for r in own]), ranks)) for name in names]
        return {"rung": rung, "candidates": len(own), "shares": sorted(shares, key=lambda pair: -pair[1])}
    return {"rung": None, "candidates": len(measured), "shares": []}


def _rank(good: NDArray[np.float64], place: int) -> float:
    """The share of candidates of about the same cost that are worse, in [0, 1]."""
    first = min(max(place - NEAR // 2, 0), max(len(good) - NEAR, 0))
    near = good[first : first + NEAR]
    return float((near < good[place]).mean() + (near == good[place]).mean() / 2)


def _groups(values: Sequence[Any]) -> NDArray[np.intp]:
    """Which values belong together: equal ones of words, thirds of numbers."""
    if any(isinstance(value, str) or value is None for value in values):
        return np.unique([str(value) for value in values], return_inverse=True)[1]
    numbers = np.array(values, dtype=np.float64)
    ends = np.unique(np.quantile(numbers, [i / GROUPS for i in range(1, GROUPS)]))
    return np.unique(np.searchsorted(ends, numbers, side="left"), return_inverse=True)[1]


def _explained(groups: NDArray[np.intp], ranks: NDArray[np.float64]) -> float:
    sizes = np.bincount(groups)
    total, count = float(((ranks - ranks.mean()) ** 2).sum()), len(sizes)
    if count < 2 or total <= 0 or len(ranks) <= count:
        return 0.0
    means = np.bincount(groups, ranks) / sizes
    between = float((sizes * (means - ranks.mean()) ** 2).sum())
    chance = (count - 1) * (total - between) / (len(ranks) - count)
    return max((between - chance) / total, 0.0)
