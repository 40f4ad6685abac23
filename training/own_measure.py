"""A measure of models of one's own: a function that a configuration or a call may name."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from prunesweep.models import UserError

from .named_code import allow, name_of

__all__ = ["MARK", "Measure", "check_marked", "measured_by", "own_quality", "spec_of"]

MARK = "__prunesweep_quality__"
Measure = Callable[[nn.Module, Iterable[Any]], float]


def own_quality(*, higher_is_better: bool) -> Callable[[Measure], Measure]:
    """Let a search compare models by a function; a decorator of that function.

    In a configuration it is ``search.quality = "python:MODULE:FUNCTION"``, in Python ``run_search(..., quality=f)``
    and ``evaluate(..., quality=f)``. It is shown by its own name. As with data of one's own (``own_data``), its module
    must be importable by every process.

    Args:
        higher_is_better: whether a larger value is the better one.

    Returns:
        A decorator of a function (model, loader) that returns a finite number. The model is in evaluation mode, without
        gradients; the loader gives (images, labels), or (words, next words), per batch, on the model's device, and may
        be gone through several times.
    """

    def mark(function: Measure) -> Measure:
        return allow(function, MARK, higher_is_better)

    return mark


def spec_of(quality: str | Measure, key: str = "quality") -> str:
    """Return the configuration's name of a quality.

    Args:
        quality: that name, or a function with the decorator ``own_quality``.
        key: what is given it, for messages.

    Raises:
        UserError: the function has no decorator, or other processes could not import it.
    """
    if isinstance(quality, str):
        return quality
    check_marked(quality, key)
    return name_of(quality, key)


def check_marked(function: Measure, key: str = "quality") -> None:
    """Raise UserError for a function without the decorator ``own_quality``."""
    if not hasattr(function, MARK):
        raise UserError(
            f"{key}: {getattr(function, '__name__', repr(function))} does not say whether higher is better: decorate "
            "it with @prunesweep.training.own_quality(higher_is_better=True)"
        )


def measured_by(function: Measure, model: nn.Module, batches: Iterable[Any]) -> float:
    """Call a function with the decorator ``own_quality``; NaN for a number that is not finite.

    Args:
        function: the function.
        model: on its device; its mode is left as it was.
        batches: (images, labels) per batch, to go through as often as one likes.

    Raises:
        UserError: it has no decorator, it failed, or it gave no number.
    """
    check_marked(function)
    name = getattr(function, "__name__", "quality")
    if iter(batches) is batches:
        raise UserError(f"{name}: the batches can be gone through only once: give a DataLoader or a list")
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            found = function(model, _Moved(batches, device))
        value = float(found)
    except Exception as error:  # whatever a function of the user's raises
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == inspect.getsourcefile(inspect.unwrap(function))]
        where = (own or frames)[-1]
        raise UserError(f"{name}: {type(error).__name__}: {error} (line {where.lineno} of {where.filename})") from error
    finally:
        model.train(training)
    return value if math.isfinite(value) else math.nan


class _Moved:
    """Batches on a device."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for batch in self.batches:
            if len(batch[1]):  # else none of its images can be read
                yield tuple(part.to(self.device) for part in batch[:2])
