"""Finetuning of a planned model: which entries of the merge and recover matrices are trained, and how fast.

Source: arXiv 2503.23455 and its released code, which trains all weights with both matrices. The support of a matrix is
the plan's: a sparse one keeps its entries, a dense one trains every entry, zeros too (``PlanSettings.form``). The loss
is the recipe's: cross-entropy and one soft distillation from the source (``training/recipes/pmvit.toml``).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from prunesweep.models import UserError, arch_of, blocks_of
from prunesweep.models.settings_table import SettingsTable
from prunesweep.pruners.hook import Hook

__all__ = ["PruneMergeSettings", "PruneMergeTraining"]


class PruneMergeSettings(SettingsTable):
    """Settings of finetuning a planned model. Weight decay acts on the matrices whatever their number of dimensions."""

    train_matrices: Literal["none", "recover", "both"] = Field(
        default="both", description="Which of merge and recover matrices are trained; the others stay as planned."
    )
    train_weights: bool = Field(
        default=True, description="Train the rest of the model; false trains the matrices alone."
    )
    lr_mult_matrices: float = Field(
        default=1.0, gt=0, description="Factor of the recipe's learning rate for the matrices."
    )
    weight_decay_matrices: float = Field(default=1e-3, ge=0, description="Weight decay of the matrices.")


class PruneMergeTraining(Hook):
    """Trains a planned model by ``settings``; ``finish`` restores ``requires_grad`` and returns None.

    Raises:
        UserError: nothing would be trained.
    """

    def __init__(self, settings: PruneMergeSettings | None = None) -> None:
        self.settings = settings or PruneMergeSettings()
        if self.settings.train_matrices == "none" and not self.settings.train_weights:
            raise UserError("train_matrices = 'none' and train_weights = false: nothing would be trained")

    def wrap(self, model: nn.Module) -> None:
        """Freeze what is not trained. Raises UserError for a model without a token plan."""
        arch = arch_of(model)
        pairs = zip(blocks_of(model), arch.blocks, strict=True)
        merges: list[Any] = [block.token_merge for block, own in pairs if own.tokens is not None]
        if not merges:
            raise UserError(f"{arch.source} has no token plan: plan it first (pruners.pmvit.plan)")
        matrices = {id(p) for merge in merges for p in merge.parameters()}
        recover = [merge.recover for merge in merges]
        which = self.settings.train_matrices
        trained = {"none": [], "recover": recover, "both": [p for merge in merges for p in merge.parameters()]}
        self._matrices: list[nn.Parameter] = trained[which]
        keep = {id(p) for p in self._matrices}
        self._before = [(p, p.requires_grad) for p in model.parameters()]
        for p, own in self._before:
            p.requires_grad_(id(p) in keep if id(p) in matrices else own and self.settings.train_weights)

    def parameter_groups(self) -> list[dict[str, Any]]:
        if not self._matrices:
            return []
        scale, decay = self.settings.lr_mult_matrices, self.settings.weight_decay_matrices
        return [{"params": self._matrices, "lr_scale": scale, "weight_decay": decay}]

    def finish(self) -> None:
        for p, own in self._before:
            p.requires_grad_(own)
