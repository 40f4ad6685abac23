"""The hook interface of methods that prune a model while the one training loop trains it.

``training.fit(model, ..., hook=hook)`` calls, in this order:

    wrap(model), parameter_groups()                     before the optimizer is made
    load_state_dict(state)                              where a run is resumed
    every epoch: start_epoch()                          the model has just been put into training mode
        every optimizer step:
            loss(terms)                                 after the forward pass
            after_backward()                            gradients are final, but for clipping
            after_step()                                weights are updated
            done                                        True ends the training
    facts                                               after every epoch, for its record
    state_dict()                                        after every epoch, where the run keeps its state

and the caller calls ``finish()`` once ``fit`` has returned True.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from prunesweep.models import UserError

__all__ = ["Collapsed", "Hook", "TrainingHook"]

Result = TypeVar("Result", covariant=True)


class Collapsed(UserError):
    """Raised when a decision is far smaller than its budget; all workers raise it at the same step."""


class TrainingHook(Protocol[Result]):
    """The interface that the training loop expects of a method; ``Hook`` implements it without any effect."""

    @property
    def done(self) -> bool:
        """Whether training may end now, in the middle of an epoch too."""

    @property
    def facts(self) -> Mapping[str, float | str]:
        """Facts about the method's progress after an epoch: the same on every rank, JSON-ready, may be empty."""

    def wrap(self, model: nn.Module) -> None:
        """Take the model, once. May replace modules, and register parameters, which are then saved with the model."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups (``params``, ``lr``, ``weight_decay``, ...) of parameters that need settings of their own."""

    def start_epoch(self) -> None:
        """Begin an epoch. The model is in training mode; it may be put into another one."""

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scalar to minimise, from timm's task: ``loss``, ``output`` (logits B·K) and the loss's parts."""

    def after_backward(self) -> None:
        """Act on the gradients: accumulated over micro-batches, averaged over ranks, unscaled and not yet clipped."""

    def after_step(self) -> None:
        """Act after the optimizer has updated the weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return all state outside the model's own: tensors, numbers, strings, lists and dicts; may be empty."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state_dict``'s form; called after ``wrap``."""

    def finish(self) -> Result:
        """Return the decision or decisions, and leave the model made of stock modules again."""


class Hook:
    """Trains as if there were no hook; methods override what they need."""

    @property
    def done(self) -> bool:
        """Never: training ends by its recipe."""
        return False

    @property
    def facts(self) -> Mapping[str, float | str]:
        """No facts."""
        return {}

    def wrap(self, model: nn.Module) -> None:
        """Leave the model as it is."""
        pass

    def check_length(self, epochs: int, updates: int) -> None:
        """Raise UserError where a training is too short for this method, whatever it finds; called after ``wrap``.

        Args:
            epochs: of the training.
            updates: of an epoch.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return no groups."""
        return []

    def start_epoch(self) -> None:
        pass

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the task's own loss."""
        return terms["loss"]

    def after_backward(self) -> None:
        pass

    def after_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def finish(self) -> Any:
        """Return no decision."""
        return None
