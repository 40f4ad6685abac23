"""Methods that prune a model while it trains ride on the one training loop as a hook.

``training.fit(model, ..., hook=hook)`` calls, in this order:

    wrap(model), parameter_groups()                     before the optimizer is made
    load_state_dict(state)                              where a run goes on
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
    """What a method has decided is far smaller than its budget; all workers find so at the same time."""


class TrainingHook(Protocol[Result]):
    """What the training loop needs of a method; ``Hook`` does nothing at all of it."""

    @property
    def done(self) -> bool:
        """Whether training may end now, in the middle of an epoch too."""

    @property
    def facts(self) -> Mapping[str, float | str]:
        """What a person wants to see of the method after an epoch, the same on every rank; JSON-ready, may be empty."""

    def wrap(self, model: nn.Module) -> None:
        """Take the model, once. May replace modules, and register parameters, which are then saved with the model."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups (``params``, ``lr``, ``weight_decay``, ...) for parameters that need settings of their own."""

    def start_epoch(self) -> None:
        """The model is in training mode; it may be put into another one."""

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What to minimise, a scalar, from what timm's task gave: ``loss``, ``output`` (logits B·K) and its parts."""

    def after_backward(self) -> None:
        """Gradients are accumulated over micro-batches, averaged over ranks and unscaled, and not yet clipped."""

    def after_step(self) -> None:
        """The optimizer has updated the weights."""

    def state_dict(self) -> dict[str, Any]:
        """All that is not in the model's own state: tensors, numbers, strings, lists and dicts. Empty: no state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``'s form; comes after ``wrap``."""

    def finish(self) -> Result:
        """The decision or decisions; the model is made of stock modules again."""


class Hook:
    """Trains as if there were no hook; methods override what they need."""

    @property
    def done(self) -> bool:
        return False

    @property
    def facts(self) -> Mapping[str, float | str]:
        return {}

    def wrap(self, model: nn.Module) -> None:
        pass

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def start_epoch(self) -> None:
        pass

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
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
        return None
