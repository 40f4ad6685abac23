"""The model that a candidate starts from: what trials train and what the look at the space before them measures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from prunesweep.models import Arch, Cut, UserError, arch_of, cut, cut_arch, load
from prunesweep.models.precision import to_float32
from prunesweep.models.recalibrate import recalibrate
from prunesweep.pruners.subspaces import SourceStreams
from prunesweep.pruners.subspaces.calibration import images_of
from prunesweep.search.config import SearchConfig
from prunesweep.training import EVAL_BATCH, Compared, Data, EvalMetrics, Quality, quality_name
from prunesweep.training.jobs.recovery import Known, Recovery
from prunesweep.training.jobs.scoring import Progress

__all__ = ["Cutter", "measure_of", "own_figures", "recovery_of"]

Further = Callable[[nn.Module, Iterable[Any]], dict[str, float]]


def recovery_of(config: SearchConfig, arch: Arch) -> Recovery | None:
    """Return how the candidates of a search are recovered; None where they start as cut.

    Args:
        config: of the search.
        arch: the source's record.
    """
    # another draw than the screen's, as far as there are images: those that were fitted to flatter
    found = Recovery(config.search.recover_images, config.seed + 1, config.search.projects(arch))
    return found if config.search.recovers(arch) else None


def measure_of(config: SearchConfig, data: Data) -> Further | None:
    """Return what measures a model on batches by ``search.quality``; None without it.

    Args:
        config: of the search.
        data: its data, whose training split may have the labels that answer.

    Raises:
        UserError: the function cannot be imported.
    """
    spec = config.search.quality
    if spec is None:
        return None
    quality = Quality.find(spec)

    def measure(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        return quality.figures(model, data, batches)

    return measure


def own_figures(config: SearchConfig, source: nn.Module, data: Data, progress: Progress) -> list[dict[str, Any]]:
    """Measure the source by ``search.quality``, on what is reported and on what the search compares by.

    Args:
        config: the search's configuration.
        source: the model, on its device.
        data: the search's data.
        progress: called with what is being done and the share of it done.

    Returns:
        The figure by its objective's name, for both; nothing in them without ``search.quality``.

    Raises:
        UserError: the function failed, or gave no finite number.
    """
    measured = list[dict[str, Any]]()
    for split in (data.report, data):
        measure = measure_of(config, split)
        if measure is None or config.search.quality is None:
            return [{}, {}]
        measured.append(measure(source, split.val_loader(EVAL_BATCH)))
        name, value = quality_name(config.search.quality), next(iter(measured[-1].values()))
        progress("evaluating the source", 1.0, f"{name} {value:.4g}")
        if not math.isfinite(value):
            raise UserError(f"search.quality = {config.search.quality!r}: gives {value:g} for the source, no number")
    return measured


class Cutter:
    """Cuts the source of a search, and recovers what is left where the configuration and the source allow it.

    Args:
        source: the model, on its device.
        data: the search's data.
        config: its configuration.
        kept: folder for what projections have in common, of all processes of a search.
        reading: makes a context in which images and saved models are read, when they are needed first.

    Attributes:
        seconds: that models and measurements have taken so far.
    """

    def __init__(
        self,
        source: nn.Module,
        data: Data,
        config: SearchConfig,
        *,
        kept: Path | None = None,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.source, self.data, self.search, self.seed = source, data, config.search, config.seed
        self.kept, self.reading, self.seconds = kept, reading, 0.0
        self.agreeing = "agreement" in config.search.objectives
        self.further = measure_of(config, data)
        self.recovery = recovery_of(config, arch_of(source))

    @cached_property
    def screen(self) -> list[Any]:
        """Images for rungs that do not train: of those held out for the search, or else of the training split."""
        if self.data.report is self.data:
            return self._training_images
        with self.reading():
            return _first(self.data.val_loader(EVAL_BATCH), self.search.screen_images)

    @cached_property
    def _training_images(self) -> list[Any]:
        with self.reading():
            return self.data.calibration(self.search.screen_images, EVAL_BATCH, self.seed)

    @cached_property
    def streams(self) -> SourceStreams:
        """The source's streams on the images that recovery fits to, which all candidates share."""
        assert self.recovery is not None
        with self.reading():
            images = images_of(self.recovery.calibration(self.data), arch_of(self.source))
        return SourceStreams(self.source, images, keep=True)

    @cached_property
    def known(self) -> Known:
        """What projections of any widths have in common."""
        assert self.recovery is not None
        return self.recovery.known(self.source, self.data, self.streams.inputs, self.kept)

    def model(self, decision: Cut | Path) -> nn.Module:
        """Return the recovered model of a decision; where there is no recovery, the cut one with its BatchNorms set.

        A saved model, of which the decision is the folder, stays as it is.
        """
        with self._clocked():
            return self._model(decision)

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun

    def _model(self, decision: Cut | Path) -> nn.Module:
        if isinstance(decision, Path):
            with self.reading():
                return to_float32(load(decision)).to(next(self.source.parameters()).device)
        if self.recovery is not None:
            known = self.known if self.recovery.project else None
            model = self.recovery.model(self.source, decision, self.streams, known=known)
            if arch_of(model) != cut_arch(arch_of(self.source), decision):
                raise RuntimeError("the decision cuts heads, or ranks that can only be chosen: it cannot be projected")
            return model
        model = cut(self.source, decision)
        recalibrate(model, self._images())
        return model

    def _images(self) -> Iterator[Any]:
        """Iterate over training images, which are read at the first item: a model without BatchNorm needs none."""
        yield from self._training_images

    def screened(self, decision: Cut | Path) -> EvalMetrics:
        """Measure a decision's model on ``screen``, untrained, as a rung of 0 epochs does."""
        model = self.model(decision)
        with self._clocked():
            return self._compared_screen.measure(model)

    def measured(self, model: nn.Module) -> EvalMetrics:
        """Measure a model on the images that candidates are compared by, and its agreement with the source."""
        with self._clocked():
            return self._compared.measure(model)

    @cached_property
    def _compared_screen(self) -> Compared:
        return Compared(self.screen, self.source, self.further)

    @cached_property
    def _compared(self) -> Compared:
        return Compared(self.data.val_loader(EVAL_BATCH), self.source, self.further)

    def accuracy(self, found: EvalMetrics) -> float:
        """Return the agreement with the source where that is an objective, otherwise the top-1; in percent.

        Where the search has a measure of its own, what that gave.
        """
        own = found.error if found.quality is None else found.quality
        accuracy = own if self.further else found.agreement if self.agreeing else found.top1
        assert accuracy is not None
        return accuracy


def _first(batches: Iterable[Any], images: int) -> list[Any]:
    """The first images of batches, which are in random order."""
    found = []
    for x, y in batches:
        found.append((x[:images], y[:images]))
        images -= len(y)
        if images <= 0:
            break
    return found
