"""Evaluations of the candidates of a search as arrays, and on a scale that a model can learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEW", "Evaluations", "standardised", "thinned"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEW = 5  # rungs with fewer results are left out: their spread is not known yet
OUTLIER = 4.0  # spreads of a rung; results of ruined candidates are clipped here
LARGEST = 1e100  # of a quality; what is beyond stands for no number, and differences of it may have none


@dataclass(frozen=True)
class Evaluations:
    """n evaluations of candidates, by ascending rung and candidate.

    Args:
        rows: (n, V) encoded points.
        rungs: (n,) rungs of the evaluations.
        candidates: (n,) numbers of the candidates.
        values: (n,) qualities, larger is better; one that is not finite is worse than all others.
    """

    rows: Floats
    rungs: Ints
    candidates: Ints
    values: Floats

    @classmethod
    def ordered(cls, rows: Floats, rungs: Ints, candidates: Ints, values: Floats) -> Evaluations:
        """Sort evaluations that come in any order.

        Args:
            rows: (n, V) encoded points.
            rungs: (n,) rungs of the evaluations.
            candidates: (n,) numbers of the candidates.
            values: (n,) qualities.
        """
        return cls(rows, rungs, candidates, values).take(np.lexsort((candidates, rungs)))

    def __len__(self) -> int:
        return len(self.values)

    def take(self, places: Ints | NDArray[np.bool_]) -> Evaluations:
        """Return the evaluations at some places, (p,) indices or an (n,) mask."""
        return Evaluations(self.rows[places], self.rungs[places], self.candidates[places], self.values[places])


def standardised(known: Evaluations) -> Evaluations:
    """Return evaluations in spreads from the median of their rung, clipped to ``OUTLIER``.

        z = (value - median) / spread        spread = half the distance between the 16th and the 84th percentile

    Rungs with few evaluations are left out. A rung's spread is at least that of the rung below, because its candidates
    were selected. An evaluation that is not finite, or beyond all sense, counts like the worst outlier; a rung without
    any other is all 0.
    """
    kept: list[Ints] = []
    values: list[Floats] = []
    spread = 1e-6
    for rung in np.unique(known.rungs):
        places = np.flatnonzero(known.rungs == rung)
        if len(places) < FEW:
            continue
        quality = known.values[places]
        finite = abs(quality) < LARGEST
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
    """Choose evaluations to keep: a fair share of every rung, plus what the rungs above leave unused.

    Args:
        rungs: (n,) rungs of the evaluations.
        most: how many to keep.
        order: (n,) ranks; those with the smallest are kept.

    Returns:
        Indices of at most ``most`` evaluations.
    """
    found: list[int] = []
    present = sorted(set(rungs.tolist()), reverse=True)
    for i, rung in enumerate(present):
        own = np.flatnonzero(rungs == rung)
        own = own[np.argsort(order[own], kind="stable")]
        found += own[: (most - len(found)) // (len(present) - i)].tolist()
    return np.array(sorted(found), dtype=np.int64)
