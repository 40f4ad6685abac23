"""Commands that end with nothing to show, by damage or too early: exit code 1, not a table without rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from prunesweep.search import Run
    from prunesweep.training import EvalMetrics

__all__ = ["NothingLeft", "check_answers", "check_begun", "check_front", "check_weights"]


class NothingLeft(Exception):
    """What was asked for came to nothing, by no fault of how it was asked; the message says why, and what to do."""


def check_front(run: Run) -> None:
    """Raise NothingLeft where a run's front is empty because of damage."""
    if reason := run.why_empty():
        raise NothingLeft(reason)


def check_begun(run: Run) -> None:
    """Raise NothingLeft where a run's front has no model yet."""
    if not run.front():
        state = run.status()
        raise NothingLeft(
            f"{run.shown}: its front has no model yet: {state['trials']['finished']} of {state['requested']} trials "
            f"have finished, {state['trials']['running']} are running; 'prunesweep status {run.shown}' says how far "
            "the search is"
        )


def check_weights(model: nn.Module, name: Any) -> None:
    """Raise NothingLeft, with the first tensor's name, where weights are NaN or infinite.

    Args:
        model: the model.
        name: what the user calls it.
    """
    from prunesweep.models.finite import not_finite

    if found := not_finite(model):
        raise NothingLeft(f"{name}: {found}")


def check_answers(found: EvalMetrics, name: Any) -> None:
    """Raise NothingLeft where a model's answers are NaN, though its weights are numbers.

    Args:
        found: what was measured.
        name: what the user calls the model.
    """
    if any(math.isnan(value) for value in found.as_dict().values()):
        raise NothingLeft(
            f"{name}: an answer is NaN, so there is nothing to measure: its training diverged, its weights are "
            "damaged, or images are not prepared as they were in training"
        )
