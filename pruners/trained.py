"""The one table of methods that decide while they train: hooks on the training loop, and their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from prunesweep.models import Arch, Cut, UserError, cost
from prunesweep.models.errors import explain, nearest
from prunesweep.pruners import spvit, uvc
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.uvc.settings import UVCSettings

from .hook import Hook
from .snapshot import Snapshot

__all__ = ["TRAINED", "Decided", "NViTSettings", "TrainedPruner", "trained_pruner"]


@dataclass(frozen=True, eq=False)
class Decided:
    """One decision of a run, for ``budget``, a share of the source's MACs.

    ``model`` is cut from the trained weights; without one, the decision is for the source as it was before.
    """

    budget: float
    cut: Cut
    model: nn.Module | None


class NViTSettings(BaseModel):
    """Of NViT's iterative pruning (``NViTPruning``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budgets: tuple[float, ...] = Field(
        default=(0.5,), min_length=1, description="MACs of the results over the source's."
    )
    eta: float = Field(default=1.0, ge=0, description="Weight of a unit's cost against its saliency.")
    interval: int = Field(default=100, ge=1, description="Updates between two pruning steps.")
    groups_per_step: int = Field(default=2, ge=1, description="Groups that one pruning step removes.")
    schedule: Literal["live", "reference"] = Field(
        default="live", description="Rank what is left, or, as the released code, all there was."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of the average of saliency over pruning steps.")


@dataclass(frozen=True)
class TrainedPruner:
    """A method that needs training: how it is set, made and read.

    ``make(settings, arch)`` gives the hook; ``decided(settings, arch, result)`` reads what its ``finish`` gave.
    ``recipe`` trains while it decides, ``finetune`` afterwards; both are names of recipes.
    """

    settings: type[BaseModel]
    make: Callable[[Any, Arch], Hook]
    decided: Callable[[Any, Arch, Any], list[Decided]]
    recipe: str
    finetune: str
    source: str  # the publication
    several: bool = True  # whether one run may serve several budgets

    def configure(self, name: str, budgets: Sequence[float], options: Mapping[str, Any]) -> Any:
        """The settings for these budgets, shares of the source's MACs. Raises UserError naming what is not allowed."""
        known = [field for field in self.settings.model_fields if field not in ("budget", "budgets")]
        for option in options:
            if option not in known:
                raise UserError(f"method {name!r}: unknown setting {option!r}. {nearest(option, known)}".rstrip())
        if len(budgets) > 1 and not self.several:
            raise UserError(f"method {name!r}: serves one budget in a run, got {list(budgets)}")
        wanted: dict[str, Any] = {"budgets": tuple(budgets)} if self.several else {"budget": budgets[0]}
        try:
            return self.settings.model_validate({**wanted, **options})
        except ValidationError as error:
            raise UserError("\n".join(f"method {name!r}: {explain(p, known)}" for p in error.errors())) from error


def _nvit(settings: NViTSettings, arch: Arch) -> Hook:
    options = settings.model_dump(exclude={"budgets"})
    return NViTPruning([budget * cost(arch).macs for budget in settings.budgets], **options)


def _snapshots(_: Any, arch: Arch, found: Sequence[Snapshot]) -> list[Decided]:
    whole = cost(arch).macs
    return [Decided(snapshot.budget / whole, snapshot.cut, snapshot.model) for snapshot in found]


TRAINED: dict[str, TrainedPruner] = {
    "uvc": TrainedPruner(
        UVCSettings,
        lambda settings, _: uvc.UVC(settings),
        _snapshots,
        recipe="uvc_stage1",
        finetune="uvc_stage2",
        source="UVC, ICLR 2022, openreview 9jsZiUgkCZP",
    ),
    "spvit": TrainedPruner(
        spvit.SPViTSettings,
        lambda settings, _: spvit.SPViT(settings),
        lambda settings, _, found: [Decided(settings.budget, found, None)],
        recipe="spvit_search",
        finetune="spvit",
        source="SPViT, arXiv 2111.11802",
        several=False,
    ),
    "nvit-iterative": TrainedPruner(
        NViTSettings, _nvit, _snapshots, recipe="nvit", finetune="nvit", source="NViT, CVPR 2023, arXiv 2110.04869"
    ),
}


def trained_pruner(name: str) -> TrainedPruner:
    """The method of this name. Raises UserError for an unknown one."""
    if name not in TRAINED:
        raise UserError(f"unknown method {name!r}; known: {', '.join(TRAINED)}. {nearest(name, TRAINED)}".strip())
    return TRAINED[name]
