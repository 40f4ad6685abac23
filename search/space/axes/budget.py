"""The budget: MACs of the result over MACs of the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from prunesweep.models import Arch, cost
from prunesweep.pruners import suggestion
from prunesweep.search.space.variables import Variable

from .base import Axis, ScoredSource

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "Budget"]


@dataclass(frozen=True, kw_only=True)
class Budget(Axis):
    """How far widths are cut once all else is decided (``Space.decode``), so it absorbs what other axes save."""

    def fields(self) -> dict[str, tuple[Any, Any]]:
        """The range, and ``budget_scale``: whether equal steps or equal factors of it are equally much looked at."""
        return {
            **super().fields(),
            "budget_scale": (
                Annotated[
                    Literal["linear", "log"],
                    Field(description="Whether equal steps or equal factors of the budget are equally much looked at."),
                ],
                "linear",
            ),
        }

    def variables(self, table: SpaceTable, source: ScoredSource) -> tuple[Variable, ...]:
        """The range, on the scale of the table."""
        low, high = table.budget
        return (Variable(self.name, self.meaning, low, high, log=table.budget_scale == "log"),)

    def check(self, table: SpaceTable) -> None:
        """Ask what was meant where a share of the source is above 1."""
        low, high = table.budget
        if not 0 < low <= high <= 1:
            meant = suggestion(high)
            given = f"budget = [{low}, {high}]: must lie in (0, 1], shares of the source's MACs"
            raise ValueError(f"{given}; {meant} Divide it by the MACs of the source" if meant else given)

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """The published share of MACs."""
        return {self.name: cost(arch).macs / cost(dense).macs}


AXIS = Budget(
    name="budget",
    meaning="MACs of the result / MACs of the source",
    default=(0.25, 0.9),
    neutral=1.0,
    alone=True,
)
