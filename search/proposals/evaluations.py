"""What is known of the candidates of a search, as arrays, and on a scale that a model can learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEW", "Evaluations", "standardised", "thinned"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEW = 5  # a rung with fewer results is not learned from: their spread says nothing yet
OUTLIER = 4.0  # spreads of a rung; how much worse than that a ruined candidate is does not matter


@dataclass(frozen=True)
class Evaluations:
    """n evaluations of candidates, by ascending rung and candidate.

    Args:
        rows: (n, V) encoded points.
        rungs: (n,) where they were evaluated.
        candidates: (n,) whose evaluations they are.
        values: (n,) qualities, larger is better; one that is not a finite number is worse than all others.
    """

    rows: Floats
    rungs: Ints
    candidates: Ints
    values: Floats

    @classmethod
    def ordered(cls, rows: Floats, rungs: Ints, candidates: Ints, values: Floats) -> Evaluations:
        """Return evaluations in order, in whatever order they came in."""
        return cls(rows, rungs, candidates, values).take(np.lexsort((candidates, rungs)))

    def __len__(self) -> int:
        return len(self.values)

    def take(self, places: Ints | NDArray[np.bool_]) -> Evaluations:
        """Return those at some places."""
        return Evaluations(self.rows[places], self.rungs[places], self.candidates[places], self.values[places])


def standardised(known: Evaluations) -> Evaluations:
    """Return evaluations measured by the median and the spread of their rung.

    Rungs with few evaluations are left out. A rung's spread is at least that of the rung below: its candidates were
    chosen. An evaluation without a finite number counts like the worst outlier; a rung without any number is all 0.
    """
    kept: list[Ints] = []
    values: list[Floats] = []
    spread = 1e-6
    for rung in np.unique(known.rungs):
        places = np.flatnonzero(known.rungs == rung)
        if len(places) < FEW:
            continue
        quality = known.values[places]
        finite = np.isfinite(quality)
        if finite.any():
            low, middle, high = np.quantile(quality[finite], (0.16, 0.5, 0.84))
            spread = max(spread, float(high - low) / 2)
            measured = np.clip((np.where(finite, quality, middle) - middle) / spread, -OUTLIER, OUTLIER)
            quality = np.where(finite, measured, -OUTLIER)
        else:
            quality = np.zeros(len(places))
        kept.append(places)
        values.append(quality)
    places = np.concatenate([np.zeros(0, np.int64), *kept])
    some = known.take(places)
    return Evaluations(some.rows, some.rungs, some.candidates, np.concatenate([np.zeros(0), *values]))


def thinned(rungs: Ints, most: int, order: Floats) -> Ints:
    """Return places of at most ``most`` evaluations: of every rung a fair share, and what the rungs above do not use.

    Args:
        rungs: (n,) of the evaluations.
        most: how many to keep.
        order: (n,) those with the smallest are kept.
    """
    found: list[int] = []
    present = sorted(set(rungs.tolist()), reverse=True)
    for i, rung in enumerate(present):
        own = np.flatnonzero(rungs == rung)
        own = own[np.argsort(order[own], kind="stable")]
        found += own[: (most - len(found)) // (len(present) - i)].tolist()
    return np.array(sorted(found), dtype=np.int64)
