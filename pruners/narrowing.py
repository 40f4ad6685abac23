"""A record whose widths shrink, and what each next removal would save at the widths of that moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

from prunesweep.models import Arch
from prunesweep.models.arch import Block, Stage
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.models.replace import replace_block

from .measures import Measure
from .ranked import GROUP_SIZES
from .scores import kind_of

__all__ = ["Narrowing", "place_of"]


class Narrowing:
    """A record whose widths shrink group by group, and what removing each next group would save at the moment.

    Args:
        arch: the record.
        measure: what the cost is.
        dropped: blocks that are left out.
        mixers: new mixers by block (``models.BlockCut.mixer``).
        tokens: token plans by block.
        without_mlp: blocks whose MLPs are left out.
        gone: units by vector that are gone from the beginning.

    Raises:
        UserError: a block cannot have its mixer or plan.
    """

    def __init__(
        self,
        arch: Arch,
        measure: Measure,
        *,
        dropped: Collection[int] = (),
        mixers: Mapping[int, str] = MappingProxyType({}),
        tokens: Mapping[int, TokenPlan] = MappingProxyType({}),
        without_mlp: Collection[int] = (),
        gone: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.arch, self.measure = arch, measure
        self.stages = [dataclasses.replace(stage, blocks=()) for stage in arch.stages]
        self.stage_of = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]
        self.blocks = {
            i: replace_block(arch, own, mixers.get(i), tokens.get(i), f"block {i}")
            for i, block in enumerate(arch.blocks)
            if i not in dropped
            for own in [dataclasses.replace(block, mlp=0) if i in without_mlp else block]
        }
        self.costs = {i: self._block(i, self.blocks[i], self.stages[self.stage_of[i]]) for i in self.blocks}
        self.outside = self._outside(self.stages)
        for name, units in gone.items():
            if units:
                self.remove(name, units)

    @property
    def total(self) -> float:
        """The cost as it is now."""
        return self.outside + sum(self.costs.values())

    def has(self, name: str) -> bool:
        """Whether there is anything to remove: a convolution has its channels, a missing mixer or MLP has nothing.

        Attention between channels has heads alone.
        """
        if kind_of(name) in ("embed", "tail"):
            return True
        block = self.blocks.get(place_of(name))
        if block is None or kind_of(name) == "mlp":
            return block is not None and block.mlp > 0
        if block.mixer == "attn":
            return True
        if block.mixer == "xca":
            return kind_of(name) == "heads"
        return block.convolves and kind_of(name) in ("v", "dim")

    def gain(self, name: str, units: int) -> float:
        """Compute what removing ``units`` from a vector would save."""
        outside, costs = self._without(name, units)
        return self.outside - outside + sum(self.costs[i] - cost for i, cost in costs.items())

    def remove(self, name: str, units: int) -> None:
        """Remove ``units`` from a vector."""
        self.outside, costs = self._without(name, units)
        self.costs |= costs
        if kind_of(name) == "embed":
            self.stages[place_of(name)] = self._narrower(place_of(name), units)
        elif kind_of(name) == "tail":
            self.arch = _shorter_tail(self.arch, place_of(name), units)
        else:
            self.blocks[place_of(name)] = _shrink(self.blocks[place_of(name)], kind_of(name), units)

    def affected(self, name: str) -> Iterator[str]:
        """List the vectors whose gains change when ``name`` loses units."""
        if kind_of(name) == "embed":
            s = place_of(name)
            stages, blocks = [s - 1, s, s + 1], [i for i in self.blocks if self.stage_of[i] == s]
        elif kind_of(name) == "tail":
            stages, blocks = [0], []
        else:
            stages, blocks = [self.stage_of[place_of(name)]], [place_of(name)]
        yield from (f"stages.{s}.embed" for s in stages)
        yield from (f"blocks.{i}.{kind}" for i in blocks for kind in GROUP_SIZES)
        if kind_of(name) in ("embed", "tail"):
            yield from (f"bands.{b}.tail" for b in range(1, len(self.arch.bands)))

    def _without(self, name: str, units: int) -> tuple[float, dict[int, float]]:
        """Compute the cost outside the blocks, and of the blocks that change, once ``units`` of a vector are gone."""
        place = place_of(name)
        if kind_of(name) == "tail":
            return self._outside(self.stages, _shorter_tail(self.arch, place, units)), {}
        if kind_of(name) != "embed":
            block = _shrink(self.blocks[place], kind_of(name), units)
            return self.outside, {place: self._block(place, block, self.stages[self.stage_of[place]])}
        stage = self._narrower(place, units)
        stages = [*self.stages[:place], stage, *self.stages[place + 1 :]]
        inside = {i: self._block(i, block, stage) for i, block in self.blocks.items() if self.stage_of[i] == place}
        return self._outside(stages), inside

    def _narrower(self, s: int, units: int) -> Stage:
        return dataclasses.replace(self.stages[s], width=self.stages[s].width - units)

    def _block(self, i: int, block: Block, stage: Stage) -> float:
        return self.measure.block(self.arch, stage, block)

    def _outside(self, stages: Sequence[Stage], arch: Arch | None = None) -> float:
        return self.measure.outside((arch or self.arch).with_stages(tuple(stages)))


def _shorter_tail(arch: Arch, band: int, units: int) -> Arch:
    """Return ``arch`` with fewer channels in the words of a band from the second on."""
    assert arch.text is not None
    tails = tuple(width - units * (b == band) for b, width in enumerate(arch.text.tails, start=1))
    return dataclasses.replace(arch, text=dataclasses.replace(arch.text, tails=tails))


def _shrink(block: Block, kind: str, units: int) -> Block:
    if kind == "dim":
        assert isinstance(block.v, int)
        each = block.v // block.qk if block.qk else 1  # a convolution has no qk
        return dataclasses.replace(block, qk=max(block.qk - units, 0), v=block.v - units * each)
    return dataclasses.replace(block, **{kind: getattr(block, kind) - units})


def place_of(name: str) -> int:
    """Return the index of the stage, block or band that a vector belongs to."""
    return int(name.split(".")[1])
