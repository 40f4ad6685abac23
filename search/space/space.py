"""The search space: how a point becomes an architecture, and what can be said before any training.

A point names the blocks that are dropped, the convolutions that take the place of attention and the tokens that blocks
work on; then width is cut, by the scores of the source, until the budget is met from below. So the budget absorbs
whatever the other variables cost or save. Decoding is a pure function of the point and the cached scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from random import Random

import torch
from optuna.distributions import BaseDistribution

from prunesweep.models import Arch, Cost, Cut, LatencyTable, UserError, cost, cut_arch
from prunesweep.models.io.provenance import digest
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.pruners import (
    Scores,
    WidthMethod,
    WidthPath,
    drop_order,
    get_method,
    kind_of,
    pmvit,
    vector_sizes,
    width_path,
)
from prunesweep.search.config import SpaceTable

from .variables import Params, Variable, variables

__all__ = [
    "DEPTH",
    "LEARNED",
    "TOKENS",
    "Candidate",
    "Params",
    "Space",
    "Spread",
    "Summary",
    "read_scores",
    "score_names",
]

DEPTH, LEARNED, TOKENS = "depth_kl", "uvc_gates", "pmvit"  # scores that are no width method's
TRAINING = ("lr", "distill_weight")  # variables that change the training, not the architecture


@dataclass(frozen=True)
class Candidate:
    """A decoded point: the decision, the record it gives, that record's exact cost, and predicted latency.

    Points with the same ``key`` are one candidate: the same decision, trained alike.
    """

    decision: Cut
    arch: Arch
    cost: Cost
    latency_ms: float | None
    key: str


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest value of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        ordered = sorted(values)
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])


@dataclass(frozen=True)
class Summary:
    """What the space holds, from a sample of its points."""

    macs: Spread
    params: Spread
    latency_ms: Spread | None
    distinct: int  # candidates among the feasible points of the sample
    reachable: tuple[float, float]  # MACs of the narrowest and the widest architecture, over the source's
    feasible: float  # share of the sample that can be built within all windows
    points: tuple[Params, ...]  # the feasible sample


@dataclass(frozen=True)
class _Shape:
    """All of a point but its budget: points that share it share one path of widths."""

    method: str
    dropped: frozenset[int]
    mixers: tuple[tuple[int, str], ...]
    keep_rate: float
    merge_start: int
    mlp_weight: float


def score_names(table: SpaceTable, method: str) -> tuple[str, ...]:
    """The scores that a space needs: width methods', and those of blocks and tokens where they are searched."""
    methods = table.methods or (method,)
    order = LEARNED if table.skip_order == "learned" else DEPTH
    depth = (order,) if table.skip[1] else ()
    return (*methods, *depth, *((TOKENS,) if table.keep_rate[0] < 1 else ()))


class Space:
    """Decodes points for one source model.

    Args:
        table: the variables and their ranges.
        arch: the source's record.
        scores: by name, those of ``score_names``; its first entry is the default width method.

    Raises:
        UserError: the table does not fit the source.
    """

    def __init__(self, table: SpaceTable, arch: Arch, scores: Mapping[str, Scores]) -> None:
        for name in ("skip", "conv", "merge_start"):
            last = arch.depth - {"skip": len(arch.stages), "conv": 0, "merge_start": 1}[name]
            if getattr(table, name)[1] > last:
                raise UserError(
                    f"space.{name} = {list(getattr(table, name))}: the source has {arch.depth} blocks, so it must not "
                    f"exceed {last}"
                )
        self.table, self.arch, self.scores, self.source_cost = table, arch, scores, cost(arch)
        methods = tuple(name for name in scores if name not in (DEPTH, LEARNED, TOKENS))
        self.variables = variables(table, methods, arch.depth)
        depth = scores.get(DEPTH) or scores.get(LEARNED)
        self._order = () if depth is None else drop_order(depth)
        self._latency: Callable[[Arch], float] | None = None
        if table.latency_table is not None:
            self._latency = LatencyTable.load(Path(table.latency_table)).predict
            self._latency(arch)  # raises where the table is one of other models
        # per instance: lru_cache on a method would keep every space alive
        self._path = lru_cache(maxsize=256)(self._make_path)
        self._plans = lru_cache(maxsize=64)(self._make_plans)

    @classmethod
    def blank(cls, table: SpaceTable, arch: Arch, method: str) -> Space:
        """A space whose scores are all equal: for what costs alone can tell. Raises UserError as ``Space`` does."""
        names = score_names(table, method)
        blank: dict[str, Scores] = {}
        for name in names:
            if name in (DEPTH, LEARNED):
                blank[name] = _blank_depth(arch)
            elif name == TOKENS:
                blank[name] = _blank_tokens(arch)
            else:
                width_method = get_method(name, WidthMethod)
                width_method.check(arch)
                if not width_method.along_path:
                    raise UserError(f"method {name!r}: decides by ratios, not along one path of budgets; use 'taylor'")
                sizes = vector_sizes(arch, width_method.kinds)
                blank[name] = Scores({vector: torch.ones(size) for vector, size in sizes.items()})
        return cls(table, arch, blank)

    @classmethod
    def check(cls, table: SpaceTable, arch: Arch, method: str) -> Space:
        """``blank``; raises UserError where no point can meet its budget too: only the floors count, not the scores."""
        space = cls.blank(table, arch, method)
        narrowest = space.reachable[0]
        if narrowest > table.budget[1]:
            raise UserError(
                f"space.budget = {list(table.budget)} cannot be met: the narrowest model still has {narrowest:.3f} of "
                "the source's MACs. Raise budget, raise skip, or set smaller space.groups"
            )
        return space

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's form of the variables that vary."""
        return {v.name: v.distribution for v in self.variables if not v.fixed}

    def complete(self, point: Params) -> dict[str, float | int | str]:
        """``point`` with the values of fixed variables. Raises UserError for a name or a value that is not allowed."""
        known = {v.name: v for v in self.variables}
        for name, value in point.items():
            if name not in known:
                raise UserError(f"{name}: no variable of this space; there are {', '.join(known)}")
            known[name].check(value)
        full = {v.name: v.first for v in self.variables if v.fixed} | dict(point)
        missing = [name for name in known if name not in full]
        if missing:
            raise UserError(f"the point lacks {', '.join(missing)}")
        return full

    def decode(self, point: Params) -> Candidate:
        """The candidate of a point.

        Raises:
            UserError: its budget is below the narrowest architecture, it leaves no block, or a window excludes it.
        """
        full = self.complete(point)
        path = self._path(self._shape(full))
        decision = path.cut(path.step_for(float(full["budget"]) * self.source_cost.macs))
        arch = cut_arch(self.arch, decision)
        found = cost(arch)
        predicted = None if self._latency is None else self._latency(arch)
        for name, value in (("params", found.params), ("latency_ms", predicted)):
            window = getattr(self.table, name)
            if window is not None and not window[0] <= value <= window[1]:
                raise UserError(f"{name} = {value:g}: outside the window {list(window)}")
        training = {name: full[name] for name in TRAINING}
        key = digest({"cut": decision.to_dict(), **training})
        return Candidate(decision, arch, found, predicted, key)

    def _shape(self, full: Params) -> _Shape:
        dropped = self._dropped(full)
        kept = [i for i in range(self.arch.depth) if i not in dropped]
        if not kept:
            raise UserError("all blocks are dropped: at least one must be kept")
        if self.table.encoding == "full":
            mixers = {i: str(full[f"mixer.{i}"]) for i in kept if full[f"mixer.{i}"] != "attn"}
        else:
            convs, last = kept[: int(full["conv"])], min(int(full["conv3"]), int(full["conv"]))
            mixers = {i: "conv3x3" if n >= len(convs) - last else "conv1x1" for n, i in enumerate(convs)}
        return _Shape(
            method=str(full["method"]),
            dropped=dropped,
            mixers=tuple(mixers.items()),
            keep_rate=float(full["keep_rate"]),
            merge_start=int(full["merge_start"]),
            mlp_weight=float(full["mlp_weight"]),
        )

    def _dropped(self, full: Params) -> frozenset[int]:
        if self.table.encoding == "full":
            return frozenset(i for i in range(self.arch.depth) if full[f"skip.{i}"])
        return frozenset(self._order[: int(full["skip"])])

    def _make_plans(self, keep_rate: float, merge_start: int, without: frozenset[int]) -> Mapping[int, TokenPlan]:
        """Token plans of the blocks from ``merge_start`` on, but for those ``without`` attention."""
        merging = [i for i in range(merge_start, self.arch.depth) if i not in without]
        if keep_rate == 1 or not merging:
            return {}
        planned = pmvit.plan(
            self.arch,
            self.scores[TOKENS],
            keep_rate,
            prune_rate=min(self.table.prune_rate, 1 - keep_rate),
            merge_list=tuple(merging),
        )
        return {i: choice.tokens for i, choice in enumerate(planned.blocks) if choice.tokens is not None}

    def _make_path(self, shape: _Shape) -> WidthPath:
        mixers = dict(shape.mixers)
        scores = self.scores[shape.method]
        weighted = {
            name: vector * shape.mlp_weight if kind_of(name) == "mlp" else vector
            for name, vector in scores.vectors.items()
        }
        return width_path(
            self.arch,
            dataclasses.replace(scores, vectors=weighted),
            dropped=sorted(shape.dropped),
            groups=self.table.group_sizes,
            mixers=mixers,
            tokens=self._plans(shape.keep_rate, shape.merge_start, shape.dropped | set(mixers)),
            least=self.table.budget[0] * self.source_cost.macs,
        )

    def source_value(self, objective: str) -> float:
        """What the source costs. Raises UserError for a latency without a table."""
        if objective != "latency_ms":
            return float(getattr(self.source_cost, objective))
        if self._latency is None:
            raise UserError("objective latency_ms: needs space.latency_table, the file of `prunesweep latency`")
        return float(self._latency(self.arch))

    @property
    def reachable(self) -> tuple[float, float]:
        """MACs of the narrowest architecture and of the widest within the window, over the source's.

        Looked for at the corners of the space, where all variables but the budget have their lowest or highest value.
        """
        macs, high = self.source_cost.macs, self.table.budget[1] * self.source_cost.macs
        paths = [self._path(self._shape(point)) for point in self._corners()]
        widest = max(p.costs[p.step_for(high)] if p.costs[-1] <= high else 0 for p in paths)
        return min(p.costs[-1] for p in paths) / macs, widest / macs

    def _corners(self) -> list[Params]:
        """Blocks, convolutions and tokens at their fewest and their most; all else at its first value."""
        ends: dict[str, list[float | int | str]] = {}
        for v in self.variables:
            corner = v.name in ("skip", "conv", "keep_rate") and not v.fixed
            ends[v.name] = [_whole(v, v.low), _whole(v, v.high)] if corner else [v.first]
        return [dict(zip(ends, values, strict=True)) for values in product(*ends.values())]

    def summarise(self, sample: int, seed: int) -> Summary:
        """Cost of ``sample`` points drawn uniformly over the variables, without those that cannot be built."""
        random, feasible, found = Random(seed), [], []
        for _ in range(sample):
            point = {v.name: v.draw(random) for v in self.variables if not v.fixed}
            try:
                found.append(self.decode(point))
            except UserError:
                continue
            feasible.append(point)
        if not feasible:
            raise UserError(
                f"space: none of {sample} points can be built within its windows. Raise budget[0] or skip[0]"
            )
        latencies = [c.latency_ms for c in found if c.latency_ms is not None]
        return Summary(
            macs=Spread.of([c.cost.macs for c in found]),
            params=Spread.of([c.cost.params for c in found]),
            latency_ms=Spread.of(latencies) if latencies else None,
            distinct=len({c.key for c in found}),
            reachable=self.reachable,
            feasible=len(feasible) / sample,
            points=tuple(feasible),
        )


def _whole(variable: Variable, value: float) -> float | int:
    return int(value) if variable.whole else value


def _blank_depth(arch: Arch) -> Scores:
    """Blocks in their order; the last one of every stage is never dropped."""
    depth = torch.arange(arch.depth, dtype=torch.float64)
    depth[torch.tensor([len(stage.blocks) for stage in arch.stages]).cumsum(0) - 1] = torch.inf
    return Scores({"depth": depth})


def _blank_tokens(arch: Arch) -> Scores:
    patches = arch.tokens - arch.prefix_tokens
    return Scores({f"blocks.{i}.tokens": torch.arange(1.0, patches + 1) for i in range(arch.depth)})


def read_scores(folder: Path, files: Mapping[str, str]) -> dict[str, Scores]:
    """Scores by name, as a run's ``run.json`` lists their files."""
    return {name: Scores.load(folder / file) for name, file in files.items()}
