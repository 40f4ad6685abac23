"""Snapshots: cut models taken during a run whose method decides while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunesweep.models import Arch, Cut, cut_arch
from prunesweep.models.builder import build_with

__all__ = ["Snapshot"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model of a run within ``budget``: the decision, and a cut copy on the CPU, in eval mode.

    ``hindrance`` says what keeps the cost from the budget; it is empty where nothing does.
    """

    budget: float
    cost: float  # at most ``budget``, in the same unit
    step: int  # optimizer steps done
    cut: Cut
    model: nn.Module
    hindrance: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the form for a hook's state, which itself knows the budget."""
        facts = {"cost": self.cost, "step": self.step, "cut": self.cut.to_dict(), "hindrance": self.hindrance}
        return {**facts, "weights": self.model.state_dict()}

    @classmethod
    def restore(cls, state: Mapping[str, Any], budget: float, arch: Arch, cfg: Mapping[str, Any] | None) -> Snapshot:
        """Restore from ``state_dict``'s form.

        Args:
            state: what ``state_dict`` returned.
            budget: the budget that the snapshot is for.
            arch: the record of the model that was cut.
            cfg: its ``pretrained_cfg``.
        """
        decision = Cut.from_dict(state["cut"])
        model = build_with(cut_arch(arch, decision), state["weights"], pretrained_cfg=cfg).eval()
        return cls(budget, state["cost"], state["step"], decision, model, state["hindrance"])
