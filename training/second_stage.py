"""The second stage of a pruning method: make its hook for finetuning from saved models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunesweep.models import Cut, UserError, load, load_provenance, weights_digest
from prunesweep.models.precision import to_float32
from prunesweep.pruners import METHODS, Method, get_method
from prunesweep.pruners.hook import Hook
from prunesweep.pruners.method import SecondStage, validated

__all__ = ["DECISION", "SecondStageJob"]

DECISION = "decision"  # key of the cut that made a model in its provenance


@dataclass(frozen=True)
class SecondStageJob:
    """A method that has a second stage, by name, with that stage's settings; JSON-ready.

    Args:
        method: its name in ``pruners.METHODS``.
        settings: settings of the stage, by name; those left out have their defaults.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def configure(self) -> Any:
        """Make the settings. Raises UserError where the method has no second stage, or a setting is not allowed."""
        return validated(f"second stage of method {self.method!r}", self._stage().settings(), self.settings)

    def hook(self, model: str | Path, dense: str | Path | None) -> Hook:
        """Make the hook for finetuning ``model``.

        Args:
            model: folder of the model to finetune.
            dense: folder of the model that it was cut from, which some methods need.

        Raises:
            UserError: the method has no second stage, a setting is not allowed, or ``model`` was not cut from
                ``dense`` by the method.
        """
        stage, settings = self._stage(), self.configure()
        if not stage.needs_decision:
            return stage.make(settings, None, None)
        facts = load_provenance(model)
        if DECISION not in facts:
            raise UserError(
                f"{model} does not say by what decision it was cut: the second stage of {self.method!r} finetunes what "
                f"`prunesweep prune --method {self.method}` decided, before any other training"
            )
        if dense is None:
            raise UserError(f"the second stage of {self.method!r} needs --teacher, the model that {model} was cut from")
        source = to_float32(load(dense))
        if weights_digest(source) != facts["source"]["weights"]:
            raise UserError(f"--teacher {dense}: {model} was cut from {facts['source']['name']} with other weights")
        return stage.make(settings, source, Cut.from_dict(facts[DECISION]))

    def check(self, model: str | Path, dense: str | Path | None) -> None:
        """Check that the hook can be made and serves the model.

        Args:
            model: folder of the model to finetune.
            dense: folder of the model that it was cut from.

        Raises:
            UserError: as for ``hook``, or the hook cannot serve the model.
        """
        self.hook(model, dense).wrap(to_float32(load(model)))

    def _stage(self) -> SecondStage:
        stage = get_method(self.method, Method).second_stage
        if stage is None:
            able = ", ".join(name for name, method in METHODS.items() if method.second_stage is not None)
            raise UserError(f"method {self.method!r} has no second stage; there is one of {able}")
        return stage
