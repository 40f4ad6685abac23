"""Settings of UVC's joint training; the defaults are the mended method, ``steps = "reference"`` the published one."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from prunesweep.models.settings_table import SettingsTable

__all__ = ["UVCSettings"]

Ratio = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0)]


class UVCSettings(SettingsTable):
    """Settings of UVC's joint training. A rate that is ``None`` follows from ``ramp_steps``."""

    # skip = 1011 reads as a number where it comes from a command line
    model_config = ConfigDict(coerce_numbers_to_str=True)

    budgets: tuple[Ratio, ...] = Field(
        default=(0.5,), min_length=1, description="MACs of the results over the source's."
    )
    skip: str | None = Field(
        default=None,
        pattern="^[01]*1[01]*$",
        description="Blocks that run, 1 kept and 0 skipped; gates are not learned then.",
    )
    skip_count: int | None = Field(
        default=None, ge=0, description="How many blocks of skip_order are skipped, from its start."
    )
    skip_order: tuple[int, ...] | None = Field(
        default=None,
        description="Blocks, the first to go first: learned by an earlier run, or measured by pruners.score_depth.",
    )
    warmup_epochs: int = Field(
        default=1, ge=0, description="Epochs before anything is decided; every learned gate is half open."
    )
    ramp_steps: int = Field(
        default=500, ge=1, description="Updates in which the target falls from the whole model to the smallest budget."
    )
    steps: Literal["normalized", "reference"] = Field(
        default="normalized",
        description="Moves of s, r and gates: in shares of a vector with a damped multiplier, or UVC's own.",
    )
    resource: Literal["exact", "paper"] = Field(
        default="exact",
        description="Count value channels that go in the value projection and the classifier, or not (UVC).",
    )
    gates: Literal["gumbel", "soft_l0"] = Field(
        default="gumbel", description="How a block's keep weight follows from its gate."
    )
    eps: float = Field(default=0.1, gt=0, description="soft_l0: w = g^2 / (g^2 + eps).")
    eps_decay: float = Field(default=0.92, gt=0, le=1, description="soft_l0: factor of eps at the start of an epoch.")
    glr: Rate | None = Field(default=None, description="Step of the gates, in logits per update of theirs.")
    gating_weight: Rate = Field(default=1.0, description="Loss that a block's MACs are worth where widths cost 1.")
    gating_interval: int = Field(
        default=50, ge=1, description="Updates that gate gradients are averaged over; reference: per step of the gates."
    )
    gate_weighting: Literal["mean", "rising"] = Field(
        default="mean", description="Gate gradients of an interval count alike, or i-th by i (UVC)."
    )
    gates_in_weight_optimizer: bool = Field(
        default=False, description="The weights' optimizer moves the gates too, decay included (UVC)."
    )
    token_gates: bool = Field(
        default=False,
        description="Patches are gated, too: those whose gates close leave every block, which is a token plan then.",
    )
    token_weight: Rate = Field(
        default=1.0,
        description="Loss that a patch's MACs are worth where widths cost 1 (UVC's is 5).",
    )
    token_l1: Rate = Field(default=0.0, description="What a patch costs besides its MACs (UVC's is 0.01).")
    token_lr: Rate | None = Field(default=None, description="Step of the token gates, in logits.")
    slr: Rate | None = Field(
        default=None, description="Step of heads and MLP units: shares of them (reference: units)."
    )
    rlr: Rate | None = Field(
        default=None, description="Step of value channels: shares of a head (reference: channels)."
    )
    sl2wd: Rate = Field(default=0.0, description="reference: decay of s and r.")
    ylr: Rate | None = Field(
        default=None, description="Rate of the multipliers that shrink heads and MLP units on their way out."
    )
    plr: Rate | None = Field(
        default=None, description="Rate of the multipliers that shrink value channels on their way out."
    )
    eta: Rate | None = Field(default=None, description="Step of the shrinking; UVC takes the weights' learning rate.")
    zlr: tuple[Rate, ...] | None = Field(
        default=None,
        min_length=1,
        description="Rate of the budget's multiplier, one after another every zlr_epochs epochs.",
    )
    zlr_epochs: int = Field(default=6, ge=1, description="Epochs per entry of zlr.")
    z_gain: Rate = Field(default=20.0, description="normalized: immediate push per share of MACs above the target.")
    z_max: float = Field(
        default=1e4, gt=0, allow_inf_nan=True, description="Limit of the budget's multiplier; inf for none."
    )
    y_init: Rate = Field(default=1e-3, description="First value of the multipliers of s.")
    p_init: Rate = Field(default=1e-3, description="First value of the multipliers of r.")
    z_init: Rate = Field(default=1e-3, description="First value of the budget's multiplier.")
    tolerance: Ratio = Field(
        default=0.01, description="normalized: share of MACs below the budget that counts as reached."
    )
    resource_band: float | None = Field(
        default=None,
        gt=0,
        description="MACs push only within this distance of the budget (UVC's z_grad_clip); off by default.",
    )
    sticky_upper_bound: bool = Field(
        default=False,
        description="reference: s and r may overshoot their maximum for a step, then stay there for good (UVC).",
    )
    r_mode: Literal["uniform", "ragged", "off"] = Field(
        default="uniform", description="Value widths: equal in all heads of a block, one per head, or untouched."
    )
    mlp_align: int = Field(default=8, ge=1, description="MLP widths that are cut are multiples of this.")
    collapse: float = Field(default=0.7, ge=0, lt=1, description="Give up below this share of the smallest budget.")
    seed: int = Field(default=0, ge=0, description="Of the gates' noise.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.skip is not None and self.skip_count is not None:
            raise ValueError("give skip or skip_count, not both")
        if (self.skip_count is None) != (self.skip_order is None):
            raise ValueError("skip_count and skip_order go together")
        if self.skip_count is not None and self.skip_count > len(self.skip_order or ()):
            raise ValueError(f"skip_count = {self.skip_count}: skip_order has only {len(self.skip_order or ())} blocks")
        return self

    @property
    def budget(self) -> float:
        """The smallest budget, which the run aims at."""
        return min(self.budgets)
