"""The units of a vector in the order in which they go, and how many may go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["GROUP_SIZES", "Ranked"]

# Units that go together: NViT's sizes; "dim" is a channel of query, key and value in all heads of a block.
GROUP_SIZES: Mapping[str, int] = {"embed": 16, "heads": 2, "qk": 8, "v": 8, "dim": 8, "mlp": 16, "sr": 16, "tail": 8}


@dataclass(frozen=True, eq=False)
class Ranked:
    """The units of one vector.

    Args:
        order: indices of the units, least important first.
        summed: (n + 1,) saliency of the first k units, so that what a group is worth is a difference.
        group: units that go together; 0 keeps all.
        finest: the least that a group can be split into.
        floor: units that stay at least; one always does.
    """

    order: tuple[int, ...]
    summed: np.ndarray
    group: int
    finest: int = 1
    floor: int = 1

    @classmethod
    def of(cls, vector: np.ndarray, group: int, *, finest: int = 1, floor: int = 1) -> Ranked:
        """Rank the units of a vector (n,) by their scores; of equal ones the first goes first."""
        order = np.argsort(vector, kind="stable")
        summed = np.concatenate([[0.0], np.cumsum(vector[order])])
        return cls(tuple(order.tolist()), summed, group, finest, max(floor, 1))

    @property
    def most(self) -> int:
        """Units that may go at most, in whole groups."""
        return max(len(self.order) - self.floor, 0) // self.group * self.group if self.group else 0

    def saliency(self, gone: int, units: int) -> float:
        """Saliency of the next ``units`` after the first ``gone``."""
        return float(self.summed[gone + units] - self.summed[gone])

    def kept(self, gone: int) -> tuple[int, ...]:
        """Indices of the units that stay once the first ``gone`` are not there, ascending."""
        return tuple(sorted(self.order[gone:]))
