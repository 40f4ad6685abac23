"""From scores to a width cut that meets a budget: score once, decide for any budget (MACs, parameters or milliseconds).

Units are removed in groups, always the group that costs least saliency per unit of cost saved at the dimensions of that
moment. That is NViT's rule, remove where S - eta * (saved cost) is lowest, with the exchange rate eta taken as the
multiplier of the budget instead of a constant to tune. Groups form anew at every step from the least important live
units of a vector, and the last group of a vector always stays (arXiv 2110.04869, section 3; the "live" schedule).

The removals for one set of scores, dropped blocks, replaced mixers and token plans are one path, so every budget is a
prefix of it. Making the decision for one more budget takes milliseconds.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from prunesweep.models import Arch, BlockCut, Cut, LatencyTable, UserError
from prunesweep.models.arch import Block, Stage
from prunesweep.models.counting import block_cost, outside_cost
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.models.replace import replace_block

from .scores import Scores, kind_of, unit_counts

__all__ = [
    "GROUP_SIZES",
    "MACS",
    "PARAMS",
    "Measure",
    "WidthPath",
    "drop_order",
    "latency",
    "live_vectors",
    "width_path",
]

# Units that go together: NViT's sizes; "dim" is a channel of query, key and value in all heads of a block.
GROUP_SIZES: Mapping[str, int] = {"embed": 16, "heads": 2, "qk": 8, "v": 8, "dim": 8, "mlp": 16, "sr": 16, "tail": 8}


@dataclass(frozen=True)
class Measure:
    """A cost that adds up over blocks: ``outside`` of a record, and ``block`` of (record, stage, block)."""

    name: str
    outside: Callable[[Arch], float]
    block: Callable[[Arch, Stage, Block], float]

    def __call__(self, arch: Arch) -> float:
        """Cost of the whole record."""
        blocks = sum(self.block(arch, stage, block) for stage in arch.stages for block in stage.blocks)
        return self.outside(arch) + blocks


MACS = Measure("macs", lambda arch: outside_cost(arch).macs, lambda *block: block_cost(*block).macs)
PARAMS = Measure("params", lambda arch: outside_cost(arch).params, lambda *block: block_cost(*block).params)


def latency(table: LatencyTable, arch: Arch) -> Measure:
    """Make a measure of predicted milliseconds per batch, for cuts of ``arch``.

    A record outside the table's range has infinite cost, so it is never chosen.

    Args:
        table: measured latencies.
        arch: the record of the model that is cut.

    Raises:
        UserError: the table is one of other models, or does not cover ``arch`` itself.
    """
    table.predict(arch)

    def inside(predict: Callable[..., float]) -> Callable[..., float]:
        def cost(*at: Any) -> float:
            try:
                return predict(*at)
            except UserError:
                return math.inf

        return cost

    return Measure("latency_ms", inside(table.outside), inside(table.block))


@dataclass(frozen=True)
class WidthPath:
    """The successive removals from one model: after ``t`` steps it costs ``costs[t]``, which falls strictly."""

    arch: Arch
    dropped: frozenset[int]
    order: Mapping[str, tuple[int, ...]]  # units of every vector, least important first
    steps: tuple[tuple[str, int], ...]  # (vector, units removed)
    costs: tuple[float, ...]
    measure: Measure
    mixers: Mapping[int, str]
    tokens: Mapping[int, TokenPlan]

    def cut(self, step: int) -> Cut:
        """Return the decision after ``step`` steps."""
        gone = dict.fromkeys(self.order, 0)
        for name, units in self.steps[:step]:
            gone[name] += units
        kept = {name: tuple(sorted(units[gone[name] :])) for name, units in self.order.items()}
        embed = tuple(kept.get(f"stages.{s}.embed") for s in range(len(self.arch.stages)))
        blocks = (self._choice(i, block, kept) for i, block in enumerate(self.arch.blocks))
        tails = tuple(kept.get(f"bands.{b}.tail") for b in range(1, len(self.arch.bands)))
        return Cut(embed=embed, blocks=tuple(blocks), tails=tails or None)

    def _choice(self, i: int, block: Block, kept: Mapping[str, tuple[int, ...]]) -> BlockCut:
        if i in self.dropped:
            return BlockCut(keep=False)
        own = {kind: kept.get(f"blocks.{i}.{kind}") for kind in ("heads", "qk", "v", "dim", "mlp", "sr")}
        new: dict[str, Any] = {"mixer": self.mixers.get(i), "tokens": self.tokens.get(i)}
        if new["mixer"] in ("none", "norm") or not any(own[kind] for kind in ("heads", "qk", "v", "dim")):
            return BlockCut(mlp=own["mlp"], sr=own["sr"], **new)
        assert isinstance(block.v, int)  # ragged values have no such vectors
        heads = BlockCut.aligned(
            block,
            heads=own["heads"] or range(block.heads),
            qk=own["dim"] or own["qk"] or range(block.qk),
            v=own["dim"] or own["v"] or range(block.v),
            mlp=own["mlp"],
        )
        return dataclasses.replace(heads, sr=own["sr"], **new)

    def step_for(self, budget: float) -> int:
        """Find the first step within ``budget``. Raises UserError where the floors do not let it be reached."""
        step = bisect.bisect_left(self.costs, -budget, key=lambda c: -c)
        if step == len(self.costs):
            raise UserError(
                f"{budget:,.6g} {self.measure.name} cannot be reached with {len(self.dropped)} blocks dropped: the "
                f"narrowest model has {self.costs[-1]:,.6g}. Raise the budget, drop more blocks, or use smaller groups"
            )
        return step


def drop_order(scores: Scores) -> tuple[int, ...]:
    """Order blocks for dropping, the least important first, from the scores of ``score_depth``.

    Left out are the last one and those of infinite importance, which are the last of their stages.
    """
    depth = scores.vectors["depth"]
    return tuple(int(i) for i in torch.argsort(depth, stable=True)[:-1] if depth[i] < torch.inf)


def live_vectors(arch: Arch, scores: Scores) -> dict[str, np.ndarray]:
    """Return the vectors that widths are decided by.

    ``attn``, one score per channel of every head, becomes ``heads`` (H,) and ``dim`` (E,), its sums over either axis;
    other vectors are taken as they are.

    Args:
        arch: the record that was scored.
        scores: a width method's scores of ``arch``.

    Returns:
        Vectors by name, in the order stages, blocks, bands.

    Raises:
        UserError: the scores were made for another model.
    """
    _check_scores(arch, scores)
    live: dict[str, np.ndarray] = {}
    for name, vector in scores.vectors.items():
        if kind_of(name) == "attn":
            per_head = vector.numpy().reshape(arch.blocks[_place(name)].heads, -1)
            stem = name.removesuffix("attn")
            live |= {f"{stem}heads": per_head.sum(1), f"{stem}dim": per_head.sum(0)}
        else:
            live[name] = vector.numpy()
    order = [f"stages.{s}.embed" for s in range(len(arch.stages))]
    order += [f"blocks.{i}.{kind}" for i in range(arch.depth) for kind in GROUP_SIZES if kind != "embed"]
    order += [f"bands.{b}.tail" for b in range(1, len(arch.bands))]
    return {name: live[name] for name in order if name in live}


def width_path(
    arch: Arch,
    scores: Scores,
    *,
    dropped: Sequence[int] = (),
    groups: Mapping[str, int] = GROUP_SIZES,
    floors: Mapping[str, float] | None = None,
    measure: Measure = MACS,
    mixers: Mapping[int, str] = MappingProxyType({}),
    tokens: Mapping[int, TokenPlan] = MappingProxyType({}),
    least: float = 0.0,
) -> WidthPath:
    """Compute all removals, in order, from ``arch`` without the ``dropped`` blocks down to the floors.

    Whatever else is decided comes first and counts as decided: a block that becomes a convolution has value channels
    and hidden units to lose, but no heads, and every MAC is that of the tokens a block will have.

    Args:
        arch: the record that was scored.
        scores: a width method's scores of ``arch``; kinds that it does not score stay whole.
        dropped: blocks left out before any width is cut.
        groups: units per group of every kind; 0 leaves that kind whole.
        floors: share of every vector of a kind that stays; one group always does.
        measure: what the budget is counted in.
        mixers: new mixers by block (``models.BlockCut.mixer``).
        tokens: token plans by block.
        least: no budget below this will be asked for; the path ends with the first step within it.

    Raises:
        UserError: scores of another model, an unknown kind, a stage without blocks, a block that does not exist, or a
            mixer or plan that it cannot have.
    """
    _check(arch, dropped, groups, floors or {})
    vectors = live_vectors(arch, scores)
    order = {name: np.argsort(vector, kind="stable") for name, vector in vectors.items()}
    model = _Narrowing(arch, frozenset(dropped), measure, mixers, tokens)
    live = {name: vector for name, vector in vectors.items() if groups[kind_of(name)] and model.has(name)}
    # summed saliency of the least important k units, so that a group's price is a difference
    summed = {name: np.concatenate([[0.0], np.cumsum(live[name][order[name]])]) for name in live}
    floor = {name: math.ceil((floors or {}).get(kind_of(name), 0.0) * len(live[name])) for name in live}
    gone = dict.fromkeys(live, 0)
    price: dict[str, float] = {}

    def reprice(name: str) -> None:
        group = groups[kind_of(name)]
        left = len(live[name]) - gone[name] - group
        gain = model.gain(name, group) if left >= max(floor[name], 1) else 0.0
        saliency = float(summed[name][gone[name] + group] - summed[name][gone[name]]) if gain > 0 else 0.0
        price[name] = saliency / gain if gain > 0 else math.inf

    steps: list[tuple[str, int]] = []
    costs = [model.total]
    for name in live:
        reprice(name)
    while model.total > least and price and price[name := min(price, key=price.__getitem__)] < math.inf:
        group = groups[kind_of(name)]
        model.remove(name, group)
        gone[name] += group
        steps.append((name, group))
        costs.append(model.total)
        for other in model.affected(name):
            if other in live:
                reprice(other)
    units = {name: tuple(int(u) for u in indices) for name, indices in order.items()}
    return WidthPath(arch, frozenset(dropped), units, tuple(steps), tuple(costs), measure, mixers, tokens)


class _Narrowing:
    """A record whose widths shrink group by group, and what removing each next group would save at the moment."""

    def __init__(
        self,
        arch: Arch,
        dropped: frozenset[int],
        measure: Measure,
        mixers: Mapping[int, str],
        tokens: Mapping[int, TokenPlan],
    ) -> None:
        self.arch, self.measure = arch, measure
        self.stages = [dataclasses.replace(stage, blocks=()) for stage in arch.stages]
        self.stage_of = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]
        self.blocks = {
            i: replace_block(arch, block, mixers.get(i), tokens.get(i), f"block {i}")
            for i, block in enumerate(arch.blocks)
            if i not in dropped
        }
        self.costs = {i: self._block(i, self.blocks[i], self.stages[self.stage_of[i]]) for i in self.blocks}
        self.outside = self._outside(self.stages)

    @property
    def total(self) -> float:
        return self.outside + sum(self.costs.values())

    def has(self, name: str) -> bool:
        """Whether there is anything to remove: a convolution has its bottleneck, a missing mixer has nothing."""
        if kind_of(name) in ("embed", "tail"):
            return True
        block = self.blocks.get(_place(name))
        if block is None or block.mixer == "attn" or kind_of(name) == "mlp":
            return block is not None
        return block.conv_kernel > 0 and kind_of(name) in ("v", "dim")

    def gain(self, name: str, units: int) -> float:
        """Compute what removing ``units`` from a vector would save."""
        outside, costs = self._without(name, units)
        return self.outside - outside + sum(self.costs[i] - cost for i, cost in costs.items())

    def remove(self, name: str, units: int) -> None:
        self.outside, costs = self._without(name, units)
        self.costs |= costs
        if kind_of(name) == "embed":
            self.stages[_place(name)] = self._narrower(_place(name), units)
        elif kind_of(name) == "tail":
            self.arch = _shorter_tail(self.arch, _place(name), units)
        else:
            self.blocks[_place(name)] = _shrink(self.blocks[_place(name)], kind_of(name), units)

    def affected(self, name: str) -> Iterator[str]:
        """List the vectors whose gains change when ``name`` loses units."""
        if kind_of(name) == "embed":
            s = _place(name)
            stages, blocks = [s - 1, s, s + 1], [i for i in self.blocks if self.stage_of[i] == s]
        elif kind_of(name) == "tail":
            stages, blocks = [0], []
        else:
            stages, blocks = [self.stage_of[_place(name)]], [_place(name)]
        yield from (f"stages.{s}.embed" for s in stages)
        yield from (f"blocks.{i}.{kind}" for i in blocks for kind in GROUP_SIZES)
        if kind_of(name) in ("embed", "tail"):
            yield from (f"bands.{b}.tail" for b in range(1, len(self.arch.bands)))

    def _without(self, name: str, units: int) -> tuple[float, dict[int, float]]:
        """Compute the cost outside the blocks, and of the blocks that change, once ``units`` of a vector are gone."""
        place = _place(name)
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
        return self.measure.outside(dataclasses.replace(arch or self.arch, stages=tuple(stages)))


def _shorter_tail(arch: Arch, band: int, units: int) -> Arch:
    """Return ``arch`` with fewer channels in the words of a band from the second on."""
    assert arch.text is not None
    tails = tuple(width - units * (b == band) for b, width in enumerate(arch.text.tails, start=1))
    return dataclasses.replace(arch, text=dataclasses.replace(arch.text, tails=tails))


def _shrink(block: Block, kind: str, units: int) -> Block:
    if kind == "dim":
        assert isinstance(block.v, int)
        return dataclasses.replace(block, qk=max(block.qk - units, 0), v=block.v - units)  # a convolution has no qk
    return dataclasses.replace(block, **{kind: getattr(block, kind) - units})


def _place(name: str) -> int:
    """Return the index of the stage, block or band that a vector belongs to."""
    return int(name.split(".")[1])


def _check(arch: Arch, dropped: Sequence[int], groups: Mapping[str, int], floors: Mapping[str, float]) -> None:
    for block in dropped:
        if not 0 <= block < arch.depth:
            raise UserError(f"dropped block {block}: the model has blocks 0..{arch.depth - 1}")
    first = 0
    for s, stage in enumerate(arch.stages):
        own = range(first, first := first + len(stage.blocks))
        if set(own) <= set(dropped):
            where = f"of stage {s} " if len(arch.stages) > 1 else ""
            raise UserError(f"all {len(own)} blocks {where}are dropped: at least one must be kept")
    if set(groups) != set(GROUP_SIZES) or min(groups.values()) < 0:
        raise UserError(f"groups = {dict(groups)}: give a size of at least 0 for each of {', '.join(GROUP_SIZES)}")
    for kind, share in floors.items():
        if kind not in GROUP_SIZES or not 0 <= share <= 1:
            raise UserError(f"floors = {dict(floors)}: give shares in 0..1 for some of {', '.join(GROUP_SIZES)}")


def _check_scores(arch: Arch, scores: Scores) -> None:
    counts = unit_counts(arch)
    kinds = {kind_of(name) for name in scores.vectors}
    foreign = [name for name in scores.vectors if name not in counts]
    if foreign:
        raise UserError(f"scores: {foreign[0]} does not exist in {arch.source}; were they made for another model?")
    for name, count in counts.items():
        vector = scores.vectors.get(name)
        if vector is None and kind_of(name) in kinds:
            raise UserError(f"scores: {name} is missing; were they made for another model?")
        if vector is not None and vector.shape != (count,):
            found = vector.numel()
            raise UserError(f"scores: {name} has {found} entries, the model needs {count}; another model's scores?")
