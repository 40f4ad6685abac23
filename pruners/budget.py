"""From scores to a width cut that meets a budget: score once, decide for any budget (MACs, parameters or milliseconds).

Units are removed in groups, always the group that costs least saliency per unit of cost saved at the dimensions of that
moment. That is NViT's rule, remove where S - eta * (saved cost) is lowest, with the exchange rate eta taken as the
multiplier of the budget instead of a constant to tune. Groups form anew at every step from the least important live
units of a vector, and the last group of a vector always stays (arXiv 2110.04869, section 3; the "live" schedule).

The removals for one set of scores, dropped blocks, replaced mixers and token plans are one path. A budget's decision is
the part of it that stays above the budget, and then what ``fill`` removes in place of a group that would take too much.
Making the decision for one more budget takes milliseconds.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from prunesweep.models import Arch, BlockCut, Cut, UserError
from prunesweep.models.arch import Block
from prunesweep.models.cutting import joint_values
from prunesweep.models.layers.token_merging import TokenPlan

from .fill import fill
from .measures import MACS, PARAMS, Measure, latency
from .narrowing import Narrowing, place_of
from .protection import Protection
from .ranked import GROUP_SIZES, Ranked
from .reached import Reached, meets
from .scores import Scores, check_scores_finite, kind_of, unit_counts

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


@dataclass(frozen=True)
class WidthPath:
    """The successive removals from one model: after ``t`` steps it costs ``costs[t]``, which falls strictly."""

    arch: Arch
    dropped: frozenset[int]
    ranked: Mapping[str, Ranked]  # units of every vector
    steps: tuple[tuple[str, int], ...]  # (vector, units removed)
    costs: tuple[float, ...]
    measure: Measure
    mixers: Mapping[int, str]
    tokens: Mapping[int, TokenPlan]
    without_mlp: frozenset[int] = frozenset()
    protected: Protection = Protection()  # noqa: RUF009 (frozen)

    def cut(self, step: int) -> Cut:
        """Return the decision after ``step`` steps."""
        return self._cut(self._gone(step))

    def reach(self, budget: float) -> Reached:
        """Return the decision for a budget, in the measure's unit.

        Raises:
            UserError: the floors do not let it be reached.
        """
        step = self.step_for(budget)
        below = self.costs[step]
        if meets(below, budget):
            return Reached(self.cut(step), below, budget)
        if not step:
            return Reached(self.cut(0), below, budget, self._little())
        gone = self._gone(step - 1)
        model = Narrowing(
            self.arch,
            self.measure,
            dropped=self.dropped,
            mixers=self.mixers,
            tokens=self.tokens,
            without_mlp=self.without_mlp,
            gone=gone,
        )
        filled = fill(model, self.ranked, gone, budget)
        if not below < filled.cost < math.inf:
            return Reached(self.cut(step), below, budget, filled.hindrance)
        return Reached(self._cut(filled.gone), filled.cost, budget, filled.hindrance)

    def _little(self) -> str:
        """Say why the model is below a budget before any width is cut."""
        decided = {
            "dropped blocks": self.dropped,
            "dropped MLPs": self.without_mlp,
            "other mixers": self.mixers,
            "token plans": self.tokens,
        }
        given = " and ".join(what for what, which in decided.items() if which)
        return f"with all its widths the model{f', with {given},' if given else ''} has {self.costs[0]:,.6g}"

    def _gone(self, step: int) -> dict[str, int]:
        """Count the units of every vector that the first ``step`` steps remove."""
        gone = dict.fromkeys(self.ranked, 0)
        for name, units in self.steps[:step]:
            gone[name] += units
        return gone

    def _cut(self, gone: Mapping[str, int]) -> Cut:
        kept = {name: own.kept(gone[name]) for name, own in self.ranked.items()}
        embed = tuple(kept.get(f"stages.{s}.embed") for s in range(len(self.arch.stages)))
        blocks = (self._choice(i, block, kept) for i, block in enumerate(self.arch.blocks))
        tails = tuple(kept.get(f"bands.{b}.tail") for b in range(1, len(self.arch.bands)))
        return Cut(embed=embed, blocks=tuple(blocks), tails=tails or None)

    def _choice(self, i: int, block: Block, kept: Mapping[str, tuple[int, ...]]) -> BlockCut:
        if i in self.dropped:
            return BlockCut(keep=False)
        own = {kind: kept.get(f"blocks.{i}.{kind}") for kind in ("heads", "qk", "v", "dim", "mlp", "sr")}
        own |= {"mlp": ()} if i in self.without_mlp else {}
        new: dict[str, Any] = {"mixer": self.mixers.get(i), "tokens": self.tokens.get(i)}
        if new["mixer"] in ("none", "norm") or not any(own[kind] for kind in ("heads", "qk", "v", "dim")):
            return BlockCut(mlp=own["mlp"], sr=own["sr"], **new)
        if block.convolves:
            channels = own["v"]
            return BlockCut(v=None if channels is None else (channels,), mlp=own["mlp"], **new)
        assert isinstance(block.v, int)  # ragged values have no such vectors
        heads = BlockCut.aligned(
            block,
            heads=own["heads"] or range(block.heads),
            qk=own["dim"] or own["qk"] or range(block.qk),
            v=joint_values(block, own["dim"] or ()) or own["v"] or range(block.v),
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
                + (f"; or protect less than {', '.join(self.protected.texts)}" if self.protected else "")
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
            per_head = vector.numpy().reshape(arch.blocks[place_of(name)].heads, -1)
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
    without_mlp: Sequence[int] = (),
    least: float = 0.0,
    protected: Protection = Protection(),  # noqa: B008 (frozen)
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
        without_mlp: blocks whose MLPs are left out, likewise.
        least: no budget below this will be asked for; the path ends with the first step within it.
        protected: blocks and units that stay.

    Raises:
        UserError: scores of another model, an unknown kind, a stage without blocks, a block that does not exist, or a
            mixer or plan that it cannot have; or what is decided touches what is protected.
    """
    _check_protected(arch, protected, dropped, mixers, tokens, without_mlp)
    _check(arch, dropped, groups, floors or {})
    model = Narrowing(arch, measure, dropped=dropped, mixers=mixers, tokens=tokens, without_mlp=without_mlp)
    ranked: dict[str, Ranked] = {}
    for name, vector in live_vectors(arch, scores).items():
        floor = math.ceil((floors or {}).get(kind_of(name), 0.0) * len(vector))
        ranked[name] = Ranked.of(
            vector, groups[kind_of(name)] if model.has(name) and not protected.keeps(name) else 0, floor=floor
        )
    gone = dict.fromkeys(ranked, 0)
    price: dict[str, float] = {}

    def reprice(name: str) -> None:
        own = ranked[name]
        gain = model.gain(name, own.group) if own.group and gone[name] + own.group <= own.most else 0.0
        price[name] = own.saliency(gone[name], own.group) / gain if gain > 0 else math.inf

    steps: list[tuple[str, int]] = []
    costs = [model.total]
    for name in ranked:
        reprice(name)
    while model.total > least and price and price[name := min(price, key=price.__getitem__)] < math.inf:
        group = ranked[name].group
        model.remove(name, group)
        gone[name] += group
        steps.append((name, group))
        costs.append(model.total)
        for other in model.affected(name):
            if other in ranked:
                reprice(other)
    decided = mixers, tokens, frozenset(without_mlp)
    return WidthPath(arch, frozenset(dropped), ranked, tuple(steps), tuple(costs), measure, *decided, protected)


def _check_protected(
    arch: Arch,
    protected: Protection,
    dropped: Sequence[int],
    mixers: Mapping[int, str],
    tokens: Mapping[int, TokenPlan],
    without_mlp: Sequence[int],
) -> None:
    protected.check(arch)
    for what, blocks, keeps in (
        ("is dropped", dropped, protected.stays),
        ("gets another mixer", mixers, protected.keeps_attention),
        ("merges tokens", tokens, protected.keeps_tokens),
        ("loses its MLP", without_mlp, protected.keeps_mlp),
    ):
        if touched := sorted(filter(keeps, blocks)):
            raise UserError(f"protect {', '.join(protected.texts)}: block {touched[0]} {what}; one of them has to give")


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
    check_scores_finite(scores)
    counts = unit_counts(arch)
    kinds = {kind_of(name) for name in scores.vectors}
    joint = {name.removesuffix("attn") + "v" for name in scores.vectors if kind_of(name) == "attn"}
    foreign = [name for name in scores.vectors if name not in counts]
    if foreign:
        raise UserError(f"scores: {foreign[0]} does not exist in {arch.source}; were they made for another model?")
    for name, count in counts.items():
        vector = scores.vectors.get(name)
        if vector is None and kind_of(name) in kinds and name not in joint:
            raise UserError(f"scores: {name} is missing; were they made for another model?")
        if vector is not None and vector.shape != (count,):
            found = vector.numel()
            raise UserError(f"scores: {name} has {found} entries, the model needs {count}; another model's scores?")
