"""What a method decides for a budget, and how near it comes."""

from __future__ import annotations

from dataclasses import dataclass

from prunesweep.models import Cut

__all__ = ["TOLERANCE", "Reached"]

TOLERANCE = 0.005  # of a budget: what costs less than this below it meets it


@dataclass(frozen=True)
class Reached:
    """A decision within a budget.

    Args:
        cut: the decision.
        cost: of the model that it gives, at most ``budget``.
        budget: in the same unit.
        hindrance: what keeps the cost further below the budget than ``TOLERANCE``; empty where nothing does.
    """

    cut: Cut
    cost: float
    budget: float
    hindrance: str = ""

    @property
    def met(self) -> bool:
        """Whether the cost is within ``TOLERANCE`` of the budget."""
        return meets(self.cost, self.budget)


def meets(cost: float, budget: float) -> bool:
    """Whether a cost is at most a budget, and at most ``TOLERANCE`` of it below."""
    return (1 - TOLERANCE) * budget <= cost <= budget
