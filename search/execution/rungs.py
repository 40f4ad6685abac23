"""Multi-objective asynchronous successive halving in promotion form: which candidate goes on to the next rung.

Asynchronous successive halving (ASHA, Li et al. 2020, algorithm 2) with non-dominated rank in place of one metric
(MO-ASHA, Schmucker et al. 2021), for objectives of mixed directions. Nothing is ever stopped: a unit of work ends by
itself, and this says whether a next one is due. Two differences from the papers:

- At most floor(n / reduction_factor) of a rung's n results are promoted, ever. Fronts move as results arrive, and
  without this cap the asynchronous rule promotes far more than its share.
- Within a rank, bands of the first minimised objective take turns, so that the front stays spread over the costs.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from prunesweep.search.store.pareto import Direction, Floats, as_losses, crowding_distance, fronts

__all__ = ["MultiObjectiveASHA"]

CHUNK = 256  # candidates that are compared with all others at a time


class MultiObjectiveASHA:
    """Decides promotions; a state machine without processes, clocks or files.

    What it answers depends only on the set of calls to ``add`` and ``promoted``, not on their order: it is rebuilt from
    the finished results and the units that were handed out. A candidate that failed on a rung is simply not added
    there; infeasible ones are never added.
    """

    def __init__(
        self,
        rungs: int,
        reduction_factor: float,
        directions: Sequence[Direction],
        *,
        bands: Sequence[float] = (),
        banded: int | None = None,
    ) -> None:
        """
        Args:
            rungs: how many there are; rung 0 is where candidates start.
            reduction_factor: one of so many results is promoted; above 1. Papers call it eta.
            directions: of the objectives, in the order of ``add``'s values.
            bands: ascending inner boundaries of the bands of one objective, in its unit; a value on a boundary belongs
                to the band above. None given: one band.
            banded: place of that objective; the first minimised one by default.
        """
        if rungs < 1 or not reduction_factor > 1:
            raise ValueError(
                f"rungs = {rungs}, reduction_factor = {reduction_factor}: there must be at least one rung, and "
                "reduction_factor must exceed 1"
            )
        if list(bands) != sorted(set(bands)) or (bands and "minimize" not in directions):
            raise ValueError(f"bands = {list(bands)}: must ascend, and need an objective that is minimised")
        self._banded = directions.index("minimize") if bands and banded is None else banded or 0
        self._rungs, self._reduction_factor = rungs, reduction_factor
        self._directions, self._bands = tuple(directions), tuple(bands)
        self._results: list[dict[int, tuple[float, ...]]] = [{} for _ in range(rungs)]
        self._promoted: list[set[int]] = [set() for _ in range(rungs)]

    def add(self, rung: int, candidate: int, values: Sequence[float]) -> None:
        """Add a finished result: the objectives of ``candidate`` on ``rung``; infinitely bad ones go last."""
        values = tuple(values)
        if len(values) != len(self._directions) or any(map(math.isnan, values)):
            raise ValueError(f"values = {values}: must be {len(self._directions)} numbers")
        self._results[rung][candidate] = values

    def promoted(self, rung: int, candidate: int) -> None:
        """Record that the unit of ``candidate`` on ``rung``, above 0, has been handed out."""
        if not 0 < rung < self._rungs:
            raise ValueError(f"rung = {rung}: candidates are promoted to rungs 1..{self._rungs - 1}")
        self._promoted[rung].add(candidate)

    def next(self) -> tuple[int, int] | None:
        """Return (rung, candidate) of the unit to hand out now, on the highest rung that has room, or None."""
        for rung in range(self._rungs - 1, 0, -1):
            if len(self._promoted[rung]) < len(self._results[rung - 1]) // self._reduction_factor:
                best = self._best(rung)
                if best is not None:
                    return rung, best
        return None

    def hopeless(self, rung: int, most: int) -> set[int]:
        """Return the candidates below ``rung`` that can never be promoted to it.

        As many that wait dominate it as there are places left, or more: those always go before it, and no later result
        changes that.

        Args:
            rung: above 0.
            most: how many results there can be on the rung below.
        """
        results, promoted = self._results[rung - 1], self._promoted[rung]
        waiting = [number for number in sorted(results) if number not in promoted]
        places = int(most // self._reduction_factor) - len(promoted)
        losses = _finite(as_losses([results[number] for number in waiting], self._directions))
        found = set[int]()
        for start in range(0, len(waiting), CHUNK):
            own = losses[start : start + CHUNK, None]
            better = ((losses <= own).all(axis=2) & (losses < own).any(axis=2)).sum(axis=1)
            found |= {waiting[start + i] for i in np.flatnonzero(better >= places)}
        return found

    def _best(self, rung: int) -> int | None:
        """Return the best candidate below ``rung`` that has not been promoted to it."""
        results, promoted = self._results[rung - 1], self._promoted[rung]
        numbers = sorted(results)
        losses = _finite(as_losses([results[number] for number in numbers], self._directions))
        taken = Counter(self._band(results[number]) for number in numbers if number in promoted)
        for front in fronts(losses):
            crowding = crowding_distance(losses[front])
            waiting = [
                (taken[self._band(results[numbers[i]])], -distance, numbers[i])
                for i, distance in zip(front, crowding, strict=True)
                if numbers[i] not in promoted
            ]
            if waiting:
                return min(waiting)[2]
        return None

    def _band(self, values: tuple[float, ...]) -> int:
        if not self._bands:
            return 0
        return bisect.bisect_right(self._bands, values[self._banded])


def _finite(losses: Floats) -> Floats:
    """Return losses with those rows beaten by all others that have an infinitely bad one: distances must be numbers."""
    found, bad = losses.copy(), (losses == np.inf).any(axis=1)
    for column in found.T:
        known = column[np.isfinite(column)]
        low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
        column[column == -np.inf] = low - 1
        column[bad] = high + 1
    return found
