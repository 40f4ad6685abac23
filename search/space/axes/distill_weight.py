"""A factor on the weights of ``finetune.distill``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import NATURAL, Axis

if TYPE_CHECKING:
    from prunesweep.training import Recipe

__all__ = ["AXIS", "DistillWeight"]


@dataclass(frozen=True, kw_only=True)
class DistillWeight(Axis):
    """How much all teachers together count against the labels."""

    def recipe(self, recipe: Recipe, value: Any) -> Recipe:
        """Multiply the weight of every distillation term."""
        terms = tuple(term.model_copy(update={"weight": term.weight * value}) for term in recipe.distill)
        return recipe.model_copy(update={"distill": terms})


AXIS = DistillWeight(
    name="distill_weight",
    meaning="factor on the weights of distillation",
    default=(1.0, 1.0),
    limits=NATURAL,
    trains=True,
)
