"""The model that a candidate starts from: what trials train and what the look at the space before them measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from torch import nn

from prunesweep.models import Cut, arch_of, cut
from prunesweep.models.recalibrate import recalibrate
from prunesweep.pruners.subspaces import can_recover
from prunesweep.search.config import SearchConfig
from prunesweep.training import EVAL_BATCH, Data, EvalMetrics, evaluate
from prunesweep.training.jobs.recovery import Recovery

__all__ = ["Cutter"]


class Cutter:
    """Cuts the source of a search, and recovers what is left where the configuration and the source allow it.

    Args:
        source: the model, on its device.
        data: the search's data.
        config: its configuration.
        reading: makes a context in which images are read, when they are needed first.
    """

    def __init__(
        self,
        source: nn.Module,
        data: Data,
        config: SearchConfig,
        *,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.source, self.data, self.search, self.seed = source, data, config.search, config.seed
        self.reading = reading
        self.compared = source if "agreement" in config.search.objectives else None
        # another draw than the screen's, as far as there are images: those that were fitted to flatter
        recovery = Recovery(self.search.recover_images, self.seed + 1)
        self.recovery = recovery if self.search.recover and can_recover(arch_of(source)) is None else None

    @cached_property
    def screen(self) -> list[Any]:
        """Images of the training split, for rungs that do not train and for BatchNorm."""
        with self.reading():
            return self.data.calibration(self.search.screen_images, EVAL_BATCH, self.seed)

    @cached_property
    def calibration(self) -> list[Any]:
        """Images of the training split that recovery fits to."""
        assert self.recovery is not None
        with self.reading():
            return self.recovery.calibration(self.data)

    def model(self, decision: Cut) -> nn.Module:
        """Return the recovered model of a decision; where there is no recovery, the cut one with its BatchNorms set."""
        if self.recovery is not None:
            return self.recovery.model(self.source, decision, self.calibration)
        model = cut(self.source, decision)
        recalibrate(model, self._images())
        return model

    def _images(self) -> Iterator[Any]:
        """Iterate over ``screen``, which is read at the first item: a model without BatchNorm needs none."""
        yield from self.screen

    def screened(self, decision: Cut) -> EvalMetrics:
        """Measure a decision's model on ``screen``, untrained, as a rung of 0 epochs does."""
        return EvalMetrics.of(evaluate(self.model(decision), self.screen, source=self.compared))

    def accuracy(self, found: EvalMetrics) -> float:
        """Return the agreement with the source where that is an objective, otherwise the top-1; in percent."""
        accuracy = found.top1 if self.compared is None else found.agreement
        assert accuracy is not None
        return accuracy
