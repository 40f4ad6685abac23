"""The learning rate of finetuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import POSITIVE, Axis

if TYPE_CHECKING:
    from prunesweep.training import Recipe

__all__ = ["AXIS", "LearningRate"]


@dataclass(frozen=True, kw_only=True)
class LearningRate(Axis):
    """Takes the place of ``finetune.lr``."""

    def recipe(self, recipe: Recipe, value: Any) -> Recipe:
        """Set the learning rate."""
        return recipe.model_copy(update={"lr": value})


AXIS = LearningRate(
    name="lr",
    meaning="finetuning learning rate (log scale)",
    default=(5e-4, 5e-4),
    log=True,
    limits=POSITIVE,
    trains=True,
)
