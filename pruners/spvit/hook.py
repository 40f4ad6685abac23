"""SPViT as a training hook: one training run that finds a mixer for every block and hidden units for every MLP.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", arXiv 2111.11802, section 3, and
the released code. The source gets gates (``pruners.spvit.supernet``), which train beside its weights on

    task loss + weight * (F - budget)^2        where F, a share of the source's MACs, is above the budget

The result is a decision alone: the model is cut from the source's own weights, its BatchNorms are recalibrated
(``models.recalibrate``), and it is finetuned, as it is or with weights that stay mixed (``pruners.spvit.mixed``).

Different from that code: F counts exact MACs, nothing pulls F up to the budget, all ranks train the same sub-network of
a step, a skipped mixer adds nothing in the end as in the search, and gates have no momentum; ``cost``, ``penalty``,
``draws``, ``skip_form`` and ``theta_momentum`` give these back. In the end hidden units are added or removed so that
the budget is met exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn

from prunesweep.models import Cut, UserError, arch_of, cost
from prunesweep.models.settings_table import SettingsTable
from prunesweep.pruners.hook import Collapsed, Hook

from .choices import check_family, fit_units, spvit_cut
from .cost import COUNTS, complexity_loss, gate_costs
from .gates import CHOICES, is_open
from .supernet import Supernet

__all__ = ["SPViT", "SPViTSettings"]

COLLAPSE = 0.7  # of the budget; a search that ends below it has lost more than it was asked to
LETTERS = dict(zip(CHOICES, "s13M", strict=True))


class SPViTSettings(SettingsTable):
    """Settings of a gate search."""

    budget: float = Field(default=0.6, gt=0, lt=1, description="MACs of the result over MACs of the source.")
    weight: float = Field(
        default=30.0,
        ge=0,
        description="Of the complexity loss, which would be this at the source's MACs with a budget of 0; SPViT's "
        "lambda times the square of the source's 10^9 MACs, 18 to 63 in its runs.",
    )
    penalty: Literal["hinge", "two_sided"] = Field(
        default="hinge",
        description="hinge: none below the budget; two_sided: SPViT's square, which also pulls up to it.",
    )
    cost: Literal["exact", "reference"] = Field(
        default="exact", description="exact MACs, or SPViT's own count (norms, no MLP on the class token)."
    )
    theta: float = Field(
        default=1.5, gt=0, description="Where all gates start; they are open with probability sigmoid(theta)."
    )
    theta_lr: float = Field(
        default=0.015,
        gt=0,
        description="Learning rate of the gates, which the schedule of the recipe lowers too; the sum over all updates "
        "should be 3 to 15, for a gate has to travel 1.5 to close (SPViT: 1e-3 in 12,500 updates).",
    )
    theta_momentum: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="First beta of Adam for the gates; without, they stop as soon as the budget is met, instead of "
        "overshooting together (SPViT: 0.9).",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="Temperature of the softmax over heads; left out: SPViT's, 0.01 for ViT, 100 for Swin.",
    )
    conv_scope: Literal["map", "window"] = Field(
        default="map",
        description="What a Swin's 3x3 convolution sees while searching; it is finetuned on the map in any case.",
    )
    skip_form: Literal["identity", "ln_residual"] = Field(
        default="identity",
        description="A skipped mixer adds nothing, or its normalised input (SPViT's finetuned models).",
    )
    draws: Literal["shared", "per_rank"] = Field(
        default="shared", description="Whether all ranks train the same sub-network of a step, or each its own (SPViT)."
    )
    seed: int = Field(default=0, ge=0, description="Of the draws of sub-networks.")


class SPViT(Hook):
    """Trains gates on mixers and hidden units; ``finish`` returns the ``Cut``, for the model as it was before.

    Args:
        settings: all of them.
    """

    def __init__(self, settings: SPViTSettings | None = None) -> None:
        self.settings = SPViTSettings() if settings is None else settings
        self.supernet: Supernet | None = None
        self._step = 0

    def wrap(self, model: nn.Module) -> None:
        """Put gates into the model.

        Raises:
            UserError: of another family, with nothing to decide about, or with windows that do not fit the scope.
        """
        own = self.settings
        self.arch = arch_of(model)
        check_family(self.arch)
        self.costs, self._exact = (gate_costs(self.arch, COUNTS[name]) for name in (own.cost, "exact"))
        if not any(self._exact.mixers) and not any(self._exact.units):
            raise UserError(f"{self.arch.source} has no attention and no MLP that gates could be put on")
        whole = ["msa"] * self.arch.depth, [block.mlp for block in self.arch.blocks]
        self._dense, self._macs = self.costs.total(*whole), cost(self.arch).macs
        self.supernet = Supernet(model, self.arch, theta=own.theta, alpha=own.alpha, conv_scope=own.conv_scope)
        self._draw()

    def parameter_groups(self) -> list[dict[str, Any]]:
        own = self.settings
        betas = (own.theta_momentum, 0.999)
        return [{"params": self._gated.thetas, "lr": own.theta_lr, "weight_decay": 0.0, "betas": betas}]

    @property
    def _gated(self) -> Supernet:
        assert self.supernet is not None, "wrap comes first"
        return self.supernet

    def _draw(self) -> None:
        """Draw the sub-network of this step, the same in all of its micro-batches."""
        several = self.settings.draws == "per_rank" and dist.is_available() and dist.is_initialized()
        self._gated.draw(self.settings.seed, self._step, dist.get_rank() if several else 0)

    def complexity(self) -> torch.Tensor:
        """Compute the complexity loss, a float64 scalar."""
        own = self.settings
        spent = self.costs.estimate(*self._gated.expected()) / self._dense
        return complexity_loss(spent, own.budget, own.weight, own.penalty)

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return terms["loss"] + self.complexity().to(terms["loss"].dtype)

    def after_step(self) -> None:
        """Draw the next sub-network."""
        self._step += 1
        self._draw()

    def _kept(self) -> list[torch.Tensor | None]:
        """List the open units of every block, on the CPU."""
        return [None if own is None else is_open(own.theta.detach()).cpu() for own in self._gated.units]

    @property
    def facts(self) -> Mapping[str, float | str]:
        """Facts about the current gates: MACs as a share of the source's, mixers stage by stage, hidden units."""
        choices = iter(self._gated.choices)
        units = [0 if own is None else int(own.sum()) for own in self._kept()]
        letters = (" ".join(LETTERS[next(choices)] for _ in stage.blocks) for stage in self.arch.stages)
        return {
            "macs_share": self._exact.total(self._gated.choices, units) / self._macs,
            "mixers": " | ".join(letters),
            "mlp_units": sum(units),
        }

    def finish(self) -> Cut:
        """Return the decision, within the budget; the model has no gates any more, and its trained weights.

        Raises:
            Collapsed: the gates say less than 0.7 of the budget.
            UserError: the mixers alone are above the budget.
        """
        facts, choices, kept = self.facts, self._gated.choices, self._kept()
        value = [None if own is None else own.theta.detach().sigmoid().cpu() for own in self._gated.units]
        self._gated.remove()
        budget = self.settings.budget
        if float(facts["macs_share"]) < COLLAPSE * budget:
            raise Collapsed(
                f"the search ended at {facts['macs_share']:.3f} of the source's macs (mixers {facts['mixers']}, "
                f"{facts['mlp_units']} hidden units), below {COLLAPSE} of budget = {budget}: lower theta_lr or weight"
            )
        units = fit_units(self._exact, choices, value, kept, budget * self._macs)
        return spvit_cut(self.arch, choices, units, skip_form=self.settings.skip_form)

    def state_dict(self) -> dict[str, Any]:
        return {"spvit_step": self._step, "settings": self.settings.model_dump()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume a run. Raises UserError where the state is of a search with other settings."""
        for name, own in self.settings.model_dump().items():
            if state["settings"].get(name) != own:
                raise UserError(
                    f"{name} = {own!r}: the run to go on with has {state['settings'].get(name)!r}; use that, or start "
                    "a run of its own"
                )
        self._step = state["spvit_step"]
        self._draw()
