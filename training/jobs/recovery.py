"""The model of a decision: cut, cut and refitted in closed form, or projected to the widths that the decision keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunesweep.models import Cut, arch_of
from prunesweep.pruners.subspaces import (
    SourceStatistics,
    SourceStreams,
    compress,
    projected_widths,
    rank_units,
    recover,
)
from prunesweep.pruners.subspaces.calibration import images_of

from ..data import Data

__all__ = ["Known", "Recovery"]

BATCH = 64  # images at a time: sums add up exactly, so no figure depends on it but for rounding


@dataclass(frozen=True)
class Known:
    """What projections of a source to any widths have in common: its statistics, and the order of its hidden units."""

    statistics: SourceStatistics
    units: Mapping[int, torch.Tensor]

    @classmethod
    def of(cls, source: nn.Module, batches: Iterable[Any]) -> Known:
        """Compute it from ``Recovery.calibration``'s images."""
        images = images_of(batches, arch_of(source))
        return cls(SourceStatistics.collect(source, images), rank_units(source, images))


@dataclass(frozen=True)
class Recovery:
    """How a cut model is recovered, without labels and without training.

    Args:
        images: calibration images, drawn from the training split without augmentation.
        seed: of the draw.
        project: take of the decision only how much of every width stays; the subspace decides what.
    """

    images: int = 512
    seed: int = 0
    project: bool = False

    def calibration(self, data: Data) -> Iterable[Any]:
        """Draw the images, as batches of (images, labels) that are read as they are asked for."""
        return data.calibration_loader(self.images, BATCH, self.seed)

    def model(
        self,
        source: nn.Module,
        decision: Cut,
        batches: Iterable[Any] | SourceStreams,
        *,
        known: Known | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> nn.Module:
        """Compute the small model; ``pruners.subspaces.can_recover`` says of which sources.

        Args:
            source: the model that the decision is about; it is not changed.
            decision: what stays.
            batches: ``calibration``'s images, or the source's streams on them.
            known: of the same source and images, where several models are projected.
            progress: told of kept blocks done and of all.

        Raises:
            UserError: the decision does not fit, or the source cannot be recovered.
        """
        if not self.project:
            return recover(source, decision, batches, progress=progress)
        widths = projected_widths(arch_of(source), decision)
        streams = SourceStreams.of(batches, source)
        known = known or Known.of(source, streams.inputs)
        return compress(source, widths, streams, statistics=known.statistics, units=known.units, progress=progress)
