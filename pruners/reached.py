"""What a budget asks for, what a method decides for it, and how near that comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunesweep.models import Cut

__all__ = ["TOLERANCE", "Reached", "meets", "spent", "suggestion"]

TOLERANCE = 0.005  # of a budget: what costs less than this below it meets it
LEAST_COUNT = 1000  # MACs or parameters: a smaller number was meant otherwise


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


def suggestion(value: float) -> str:
    """Ask what a budget stands for that is too large for a share and too small for a count; empty for others."""
    return f"did you mean {value:g}M or {value:g}G?" if 1 < value < LEAST_COUNT else ""


def spent(measure: str, budget: float, cost: float, whole: float, hindrance: str = "") -> dict[str, Any]:
    """Say what was asked for and what is spent, JSON-ready.

    Args:
        measure: name of what is counted.
        budget: the largest cost allowed.
        cost: of the decision.
        whole: cost of the source.
        hindrance: what keeps the cost from the budget.
    """
    facts = {
        "measure": measure,
        "limit": budget,
        "cost": cost,
        "limit_share": budget / whole,
        "cost_share": cost / whole,
    }
    return {**facts, "hindrance": hindrance} if hindrance else facts
