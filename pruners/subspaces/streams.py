"""A source's residual stream, half a block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from prunesweep.models import Arch, BlockView, arch_of, block_views
from prunesweep.models.families import family_of
from prunesweep.models.families.views import AttentionView, MlpView, Reader
from prunesweep.models.precision import widened

from .batches import Batches
from .calibration import images_of
from .source import SourceStatistics, to_model

__all__ = ["Half", "LayerOutputs", "SourceStreams", "Step", "scouted", "steps"]

SCOUT_ROWS = 8192  # tokens that models to compare are fitted to, at most

Half = tuple[int, str]  # number of a block, and "attention" or "mlp"


@dataclass(frozen=True, eq=False)
class Step:
    """What leads from one stream to the next: half a block, or the entrance of a stage other than the first.

    Args:
        run: computes the next stream from this one, (B, ..., D).
        stage: number of the stage of the next stream.
        view: the block; None for an entrance.
        attention, mlp: the half of the block that is run; the other one is None.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    stage: int
    view: BlockView | None = None
    attention: AttentionView | None = None
    mlp: MlpView | None = None

    @property
    def half(self) -> Half | None:
        """The half of a block; None for an entrance."""
        return None if self.view is None else (self.view.index, "mlp" if self.attention is None else "attention")


def steps(model: nn.Module, arch: Arch) -> Iterator[Step]:
    """List all steps of a model, from its first stream to its last."""
    views = block_views(model, arch)
    for s, stage in enumerate(arch.stages):
        if s:
            yield Step(family_of(arch).entrance(model, arch, s).run, s)
        for view in (view for view in views if view.stage == s):
            if view.attention is not None:
                yield Step(partial(view.attention.after, grid=stage.grid), s, view, attention=view.attention)
            if view.mlp is not None:
                yield Step(partial(view.mlp.after, rows=stage.grid[0]), s, view, mlp=view.mlp)


def scouted(model: nn.Module, fit: Batches, statistics: SourceStatistics) -> SourceStreams:
    """Return the kept streams of the first batches, as many as models that are only compared need to be fitted to.

    Args:
        model: the source.
        fit: batches of what it takes.
        statistics: of the source, which say how many tokens an input has.
    """
    per_input = statistics.rows / statistics.images
    seen = [0, *accumulate(inputs * per_input for inputs in fit.lengths[:-1])]
    return SourceStreams(model, fit[: sum(before < SCOUT_ROWS for before in seen)], keep=True)


class LayerOutputs:
    """What layers of a source's block make of its streams, kept while all models of the source work on that block."""

    def __init__(self) -> None:
        self._block, self._found = -1, dict[str, Batches]()

    def of(self, block: int, reader: Reader, x: Sequence[torch.Tensor]) -> Callable[[int], torch.Tensor]:
        """Return a layer's outputs by batch, each computed when it is asked for first.

        Args:
            block: number of the layer's block; those of another one are forgotten.
            reader: the layer.
            x: the source's streams that it reads.
        """
        if block != self._block:
            self._block, self._found = block, {}
        kept = self._found.setdefault(reader.name, Batches())

        def at(n: int) -> torch.Tensor:
            while len(kept) <= n:
                kept.append(reader(x[len(kept)]))
            return kept[n]

        return at


class SourceStreams:
    """The streams of a source on calibration images, each computed when it is asked for, from the one before.

    Whoever makes several models of one source hands them the same streams, kept, in place of images.

    Args:
        model: the source; put into evaluation mode while streams are computed.
        inputs: batches of what it takes.
        keep: keep all of them, for other models of the same source; otherwise those in front of the block that is
            worked on are forgotten.
    """

    def __init__(self, model: nn.Module, inputs: Batches, *, keep: bool = False) -> None:
        self.model, self.inputs, self.keep = model, inputs, keep
        self.arch = arch_of(model)
        self.views = block_views(model, self.arch)
        self._steps = list(steps(model, self.arch))
        self._found: dict[int, Batches] = {}  # by number of steps

    def entry(self, stage: int) -> Batches:
        """Return the first stream of a stage."""
        return self._after(sum(step.stage < stage or (step.stage == stage and not step.view) for step in self._steps))

    def last(self, stage: int) -> Batches:
        """Return the last stream of a stage."""
        return self._after(sum(step.stage <= stage for step in self._steps))

    def front(self, block: int) -> Batches:
        """Return the stream in front of a block."""
        return self._after(self._in_front(block))

    def middle(self, block: int) -> Batches:
        """Return the stream between the halves of a block; that in front of it, where it has no attention."""
        return self._after(self._in_front(block) + (self.views[block].attention is not None))

    def forget(self, block: int) -> None:
        """Let go of the streams in front of a block, unless they are kept."""
        if not self.keep:
            self._found = {n: own for n, own in self._found.items() if n >= self._in_front(block)}

    def _in_front(self, block: int) -> int:
        stage = self.views[block].stage
        return sum(step.stage <= stage and (not step.view or step.view.index < block) for step in self._steps)

    def _after(self, count: int) -> Batches:
        if not self.model.training:
            return self._computed(count)
        self.model.eval()
        try:
            return self._computed(count)
        finally:
            self.model.train()

    def _computed(self, count: int) -> Batches:
        have = max((n for n in self._found if n <= count), default=0)
        if have not in self._found:
            stem = family_of(self.arch).stem
            self._found[0] = self._stored(stem(self.model, to_model(self.model, batch)) for batch in self.inputs)
        for n in range(have, count):
            self._found[n + 1] = self._stored(map(self._steps[n].run, self._found[n]))
            if not self.keep and n > have:  # of blocks that are passed
                del self._found[n]
        return self._found[count]

    @classmethod
    def of(cls, batches: Any, model: nn.Module) -> SourceStreams:
        """Return the streams on images in any form that ``images_of`` takes; given streams as they are."""
        return batches if isinstance(batches, cls) else cls(widened(model), images_of(batches, arch_of(model)))

    def _stored(self, stream: Iterable[torch.Tensor]) -> Batches:
        return Batches(stream, limit=Batches.IN_MEMORY - sum(own.in_memory for own in self._found.values()))
