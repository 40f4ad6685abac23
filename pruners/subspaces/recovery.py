"""Recovery of a cut model: readers, writers and head refitted in closed form, without labels and without training.

A method has chosen which channels, heads, units, blocks, mixers and tokens stay; ``pruners.subspaces.refit`` does the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from prunesweep.models import Cut, arch_of, cut
from prunesweep.models.cutting import space_reductions
from prunesweep.models.feature_head import with_feature_head
from prunesweep.models.precision import narrowed, widened

from .calibration import shrinkage_for
from .refit import SHRINKAGE, Refit
from .source import open_source
from .streams import SourceStreams

__all__ = ["recover"]


@torch.no_grad()
def recover(
    model: nn.Module,
    decision: Cut,
    batches: Iterable[Any] | SourceStreams,
    *,
    shrinkage: float = SHRINKAGE,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Cut a model and refit what is left. The record and the cost are those of ``cut(model, decision)``.

    Args:
        model: the source, for which ``can_recover`` has no reason; it is not changed. Its dtype is that of the result,
            computed in float32 where that is half precision.
        decision: what stays.
        batches: calibration images or texts in any form that ``images_of`` takes, without augmentation;
            or the source's streams on them.
        shrinkage: lambda of the fits, in units of the features' mean variance; raised, with a warning, where images
            are too few.
        progress: told of kept blocks done and of all.

    Returns:
        The recovered model, in evaluation mode.

    Raises:
        UserError: the decision does not fit, the source cannot be refitted, an image is not one of its, or an
            activation is not finite.
    """
    arch = open_source(model)
    given, model = model, widened(model)
    streams = SourceStreams.of(batches, model)
    small = cut(model, decision).eval()
    if arch_of(small).feature_head:
        model = with_feature_head(model)
    shrinkage = shrinkage_for(arch_of(small), streams.inputs, shrinkage)
    mode = model.training
    model.eval()
    try:
        work = Refit(model, small, space_reductions(arch, decision), streams, shrinkage=shrinkage)
        work.run([i for i, choice in enumerate(decision.blocks) if choice.keep], progress)
    finally:
        model.train(mode)
    return narrowed(small, given)
