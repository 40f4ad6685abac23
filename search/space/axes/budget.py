"""The budget: MACs of the result over MACs of the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunesweep.models import Arch, cost

from .base import SHARE, Axis

__all__ = ["AXIS", "Budget"]


@dataclass(frozen=True, kw_only=True)
class Budget(Axis):
    """How far widths are cut once all else is decided (``Space.decode``), so it absorbs what other axes save."""

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """The published share of MACs."""
        return {self.name: cost(arch).macs / cost(dense).macs}


AXIS = Budget(
    name="budget",
    meaning="MACs of the result / MACs of the source",
    default=(0.25, 0.9),
    limits=SHARE,
    neutral=1.0,
    alone=True,
)
