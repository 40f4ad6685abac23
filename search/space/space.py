"""The search space: how a point becomes an architecture, and what can be said before any training.

A point has a value for every axis (``axes``). The axes say which blocks are dropped, which convolutions take the place
of attention and which tokens blocks work on; then widths are cut, by the scores of the source, until the budget is met
from below, within 0.5 % where units are fine enough. So the budget absorbs what the other axes cost or save. Decoding
is a pure function of the point and the cached scores.

Axes may save more than a budget asks for, and then there is no width to give back: many budgets are one architecture.
So a search only looks at points whose candidates cost what their budgets say (``Space.placed``): either the axes give
back a part of what they save (``fitted``), or the budget becomes the cost that the candidate has (``priced``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from random import Random

from optuna.distributions import BaseDistribution

from prunesweep.models import Arch, Cost, Cut, LatencyTable, UserError, cost, cut_arch, read_arch
from prunesweep.models.io.provenance import digest
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.pruners import MACS, Scores, WidthPath, drop_order, pmvit, width_path
from prunesweep.pruners.narrowing import Narrowing
from prunesweep.pruners.protection import Protection
from prunesweep.pruners.reached import TOLERANCE
from prunesweep.pruners.subspaces import projectable, projected_groups
from prunesweep.search.config import SpaceTable
from prunesweep.training.jobs.proposal import Proposal, is_proposal

from .axes import AXES, TOKENS, Draft, ScoredSource, active_axes, variables
from .axes.base import DEPTH, LEARNED
from .variables import MODEL, Params, Variable

__all__ = [
    "Candidate",
    "Params",
    "Range",
    "Space",
    "Summary",
    "candidate_key",
    "candidate_names",
    "read_scores",
    "score_names",
]

STEPS = 16  # from a point to the source's own blocks and tokens


@dataclass(frozen=True)
class Candidate:
    """A decoded point: the decision, the record it gives, that record's exact cost, and predicted latency.

    The decision of a saved model that the search was given is that model's folder. Points with the same ``key`` have
    the same decision, trained alike; see ``candidate_names``.
    """

    decision: Cut | Path
    arch: Arch
    cost: Cost
    latency_ms: float | None
    key: str


@dataclass(frozen=True)
class Range:
    """Smallest, middle and largest value of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Range:
        ordered = sorted(values)
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])


@dataclass(frozen=True)
class Summary:
    """What the space holds, from a sample of its points."""

    macs: Range
    params: Range
    latency_ms: Range | None
    distinct: int  # candidates among the feasible points of the sample
    reachable: tuple[float, float]  # MACs of the narrowest and the widest architecture, over the source's
    feasible: float  # share of the sample that can be built within all windows
    points: tuple[Params, ...]  # the feasible sample


def score_names(table: SpaceTable, method: str) -> tuple[str, ...]:
    """Return the names of the scores that a space needs, the default width method's first.

    Args:
        table: the ``[space]`` table of a configuration.
        method: the width method that is used if the table names none.
    """
    return tuple(dict.fromkeys(name for axis in AXES.values() for name in axis.needs(table, method)))


def candidate_key(decision: Cut | Path, point: Params) -> str:
    """Return a digest of a decision and of the values of a point that change its training.

    Args:
        decision: the cut, or the folder of a saved model, whose name tells it from others.
        point: values of all variables, fixed ones too.
    """
    own = {"given": decision.name} if isinstance(decision, Path) else {"cut": decision.to_dict()}
    return digest({**own, **_training(point)})


def candidate_names(key: str, arch_hash: str, point: Params) -> tuple[str, str]:
    """Return digests of which candidates that are one and the same share at least one.

    One decision trained alike is one candidate, and so is one architecture cut by one method and trained alike: what
    other axes save lies below many budgets, and several keep rates keep equally many tokens.

    Args:
        key: ``candidate_key`` of the candidate.
        arch_hash: hash of its architecture.
        point: values of all variables, fixed ones too.
    """
    return key, digest({"arch": arch_hash, "method": point["method"], **_training(point)})


def _training(point: Params) -> dict[str, float | int | str]:
    return {axis.name: point[axis.name] for axis in AXES.values() if axis.trains}


class Space:
    """Decodes points for one source model.

    Args:
        table: the variables and their ranges.
        arch: the source's record.
        scores: by name, those of ``score_names``; its first entry is the default width method.
        projected: candidates are projected to the widths that are decided, so heads stay (see ``projected_groups``).

    Raises:
        UserError: the table does not fit the source.
    """

    def __init__(self, table: SpaceTable, arch: Arch, scores: Mapping[str, Scores], *, projected: bool = False) -> None:
        for axis in AXES.values():
            axis.fit(table, arch)
        self.protected = Protection.parse(table.protect, "space.protect")
        self.protected.check(arch, "space.protect")
        scores = {name: _with_protected(self.protected, own) for name, own in scores.items()}
        self._check_skipped(table, arch, scores)
        self.table, self.arch, self.scores, self.source_cost = table, arch, scores, cost(arch)
        self._projected = projected
        self._axes, self._source = active_axes(table), ScoredSource(arch, scores)
        self.variables = variables(table, self._source)
        self._groups = projected_groups(arch, table.group_sizes) if projected else table.group_sizes
        self._latency: Callable[[Arch], float] | None = None
        if table.latency_table is not None:
            self._latency = LatencyTable.load(Path(table.latency_table)).predict
            self._latency(arch)  # raises where the table is one of other models
        # per instance: lru_cache on a method would keep every space alive
        self._whole = lru_cache(maxsize=1024)(self._full_width)
        self._path = lru_cache(maxsize=256)(self._make_path)
        self._plans = lru_cache(maxsize=64)(self._make_plans)

    def _check_skipped(self, table: SpaceTable, arch: Arch, scores: Mapping[str, Scores]) -> None:
        depth = scores.get(DEPTH) or scores.get(LEARNED)
        if not self.protected or depth is None:
            return
        free = len(drop_order(depth))
        if table.skip[1] > free:
            raise UserError(
                f"space.skip = {list(table.skip)}: only {free} of {arch.depth} blocks may be dropped, as space.protect "
                f"= {list(table.protect)} and the stages need the others: lower skip[1]"
            )

    @classmethod
    def blank(cls, table: SpaceTable, arch: Arch, method: str, *, projected: bool = False) -> Space:
        """A space whose scores are all equal: for what costs alone can tell. Raises UserError as ``Space`` does."""
        blank = {name: axis.blank(name, arch) for axis in AXES.values() for name in axis.needs(table, method)}
        return cls(table, arch, blank, projected=projected)

    @classmethod
    def check(cls, table: SpaceTable, arch: Arch, method: str, *, projected: bool = False) -> Space:
        """``blank``; also raises UserError where no point can meet its budget. That depends on no scores."""
        space = cls.blank(table, arch, method, projected=projected)
        narrowest = space.reachable[0]
        if narrowest > table.budget[1]:
            raise UserError(
                f"space.budget = {list(table.budget)} cannot be met: the narrowest model still has {narrowest:.3f} of "
                "the source's MACs. Raise budget, raise skip, or set smaller space.groups"
            )
        widest = max(space._share(point) for point in space._corners())
        if widest < (1 - TOLERANCE) * table.budget[0]:
            raise UserError(
                f"space.budget = {list(table.budget)} cannot be met: with all its widths the largest model has only "
                f"{widest:.3f} of the source's MACs. Lower budget[0], or what skip, conv and keep_rate take at least"
            )
        return space

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's form of the variables that vary."""
        return {v.name: v.distribution for v in self.variables if not v.fixed}

    def complete(self, point: Params) -> dict[str, float | int | str]:
        """``point`` with the values of fixed variables, without ``MODEL``.

        Raises UserError for a name or a value that is not allowed.
        """
        known = {v.name: v for v in self.variables}
        point = {name: value for name, value in point.items() if name != MODEL}
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
        """The candidate of a point; of one with ``MODEL``, that model or decision.

        Raises:
            UserError: its budget is below the narrowest architecture, it leaves no block, a window excludes it, or its
                model is not there, or of another kind than the source.
        """
        full = self.complete(point)
        decision = self._decision(point, full)
        arch = read_arch(decision) if isinstance(decision, Path) else cut_arch(self.arch, decision)
        if MODEL in point:
            self._check_given(arch)
        if self.protected and (reason := self.protected.broken(self.arch, arch)):
            raise UserError(f"space.protect = {list(self.table.protect)}: {reason}")
        found = cost(arch)
        predicted = None if self._latency is None else self._latency(arch)
        for name, value in (("params", found.params), ("latency_ms", predicted)):
            window = getattr(self.table, name)
            if window is not None and not window[0] <= value <= window[1]:
                raise UserError(f"{name} = {value:g}: outside the window {list(window)}")
        return Candidate(decision, arch, found, predicted, candidate_key(decision, full))

    def _decision(self, point: Params, full: Params) -> Cut | Path:
        if MODEL in point:
            given = Path(str(point[MODEL]))
            return self.proposed(given) if is_proposal(given) else given
        return self._path(self._draft(full)).reach(float(full["budget"]) * self.source_cost.macs).cut

    def proposed(self, file: Path) -> Cut:
        """The decision in a file; where candidates are projected, with all heads, to its widths.

        Raises:
            UserError: the file cannot be read, or its decision is about another source.
        """
        decision = Proposal.load(file).cut
        return projectable(self.arch, decision) if self._projected else decision

    def _check_given(self, arch: Arch) -> None:
        """Raise UserError where a saved model or a decision cannot be a candidate, by its kind or by its MACs."""
        for name in ("family", "img_size", "in_chans", "num_classes", "text"):
            own, wanted = getattr(arch, name), getattr(self.arch, name)
            if own != wanted:
                raise UserError(f"{name} = {own!r}: the search's source has {wanted!r}")
        low, high = self.table.budget
        share = cost(arch).macs / self.source_cost.macs
        if not (1 - TOLERANCE) * low <= share <= high:
            raise UserError(f"{share:.4g} of the source's MACs: outside space.budget = {list(self.table.budget)}")

    def placed(self, point: Params) -> Params:
        """A point near another one whose candidate costs what its budget says, within 0.5 %.

        Where there is none, because units are too coarse for the window, this is the point itself.

        Args:
            point: of the space.
        """
        for near in (self.fitted(point), {**point, **{v.name: own for v, own in self._saving}}):
            try:
                return self.priced(near)
            except UserError:
                continue
        return point

    def fitted(self, point: Params) -> Params:
        """A point of the same budget whose blocks and tokens leave at least that much to widths.

        All axes that save something move together towards the source's own blocks and tokens, no further than the
        budget asks for: numbers along their ranges, choices one by one, in an order that is drawn for the point. The
        point is unchanged where that is not enough, and where the budget is fixed at 1: then widths stay whole, and
        the other axes alone decide what a candidate costs.

        Args:
            point: of the space.
        """
        full = self.complete(point)
        wanted = (1 - TOLERANCE) * float(full["budget"])
        if self.table.budget[0] == 1 or self._share(full) >= wanted:
            return point
        choices = [v.name for v, own in self._saving if _is_choice(v) and full[v.name] != own]
        varying = {v.name: full[v.name] for v in self.variables if not v.fixed}  # axes that are fixed change nothing
        Random(digest(varying)).shuffle(choices)

        def moved(step: int) -> Params:
            kept = choices[: round(len(choices) * step / STEPS)]
            values = {v.name: full[v.name] if v.name in kept else own for v, own in self._saving if _is_choice(v)}
            for v, own in self._saving:
                if not _is_choice(v):
                    value = float(own) + (float(full[v.name]) - float(own)) * step / STEPS
                    values[v.name] = round(value) if v.whole else value
            return values

        if self._share({**full, **moved(0)}) < wanted:
            return point
        kept, lost = 0, STEPS
        while lost - kept > 1:
            middle = (kept + lost) // 2
            kept, lost = (middle, lost) if self._share({**full, **moved(middle)}) >= wanted else (kept, middle)
        return {**point, **moved(kept)}

    @cached_property
    def neutral(self) -> dict[str, float | int | str]:
        """Values of the variables that leave the source as it is, or nearly so; of those without, the middle."""
        return {
            v.name: v.first if axis.changes_cost and axis.neutral is None else v.nearest(axis.neutral)
            for axis in self._axes
            for v in axis.variables(self.table, self._source)
            if not v.fixed
        }

    @cached_property
    def idle(self) -> dict[str, float | int | str]:
        """Values that do nothing, of the variables that have such a value; a learning rate has none."""
        idle = [axis for axis in self._axes if axis.changes_cost or axis.neutral is not None]
        named = {v.name for axis in idle for v in axis.variables(self.table, self._source)}
        return {name: value for name, value in self.neutral.items() if name in named}

    @cached_property
    def _saving(self) -> tuple[tuple[Variable, float | int | str], ...]:
        """Variables of the axes that change the cost, with the values that leave the source as it is, or nearly so."""
        return tuple(
            (v, self.neutral[v.name])
            for axis in self._axes
            if axis.changes_cost
            for v in axis.variables(self.table, self._source)
            if not v.fixed
        )

    def priced(self, point: Params) -> Params:
        """The point with the budget that its candidate has, where it is further below the one given than 0.5 %.

        That is where the other axes leave less, or where units are coarse; then the next larger cost is taken if the
        next smaller one is outside the window.

        Args:
            point: of the space; one of a fixed budget is returned as it is.

        Raises:
            UserError: no such budget is in the window, or the narrowest architecture is above the budget.
        """
        if "budget" not in point:
            return point
        path, macs = self._path(self._draft(self.complete(point))), self.source_cost.macs
        budget = float(point["budget"]) * macs
        reached, step = path.reach(budget), path.step_for(budget)
        if reached.met:
            return point
        for near in (path.costs[step], *path.costs[max(step - 1, 0) : step]):
            share = math.nextafter(near / macs, 1)  # which times the source's MACs is not less than the cost
            if self.table.budget[0] <= share <= self.table.budget[1]:
                return {**point, "budget": share}
        raise UserError(
            f"budget = {point['budget']:g}: {reached.hindrance}, which is outside space.budget = "
            f"{list(self.table.budget)}. Lower budget[0], or set smaller space.groups"
        )

    def _share(self, full: Params) -> float:
        """MACs of a point's blocks and tokens at all their widths, over the source's; 0 where a stage has no block."""
        try:
            draft = self._draft(full)
        except UserError:
            return 0.0
        # neither the method nor weights of saliency matter before a width is cut
        return self._whole(dataclasses.replace(draft, method="", weights=()))

    def _full_width(self, draft: Draft) -> float:
        first, mixers = 0, dict(draft.mixers)
        for stage in self.arch.stages:
            own = range(first, first := first + len(stage.blocks))
            if draft.dropped.issuperset(own):
                return 0.0
        tokens = self._plans(draft.keep_rate, draft.merge_start, draft.dropped | set(mixers))
        model = Narrowing(
            self.arch,
            MACS,
            dropped=sorted(draft.dropped),
            mixers=mixers,
            tokens=tokens,
            without_mlp=draft.without_mlp,
        )
        return model.total / self.source_cost.macs

    def _draft(self, full: Params) -> Draft:
        draft = Draft()
        for axis in self._axes:
            draft = axis.apply(draft, full, self._source)
        draft = self._sparing(draft)
        if not draft.kept(self.arch.depth):
            raise UserError("all blocks are dropped: at least one must be kept")
        return draft

    def _sparing(self, draft: Draft) -> Draft:
        """Take back what an axis has decided about something that is protected."""
        if not self.protected:
            return draft
        return dataclasses.replace(
            draft,
            dropped=frozenset(i for i in draft.dropped if not self.protected.stays(i)),
            mixers=tuple((i, mixer) for i, mixer in draft.mixers if not self.protected.keeps_attention(i)),
            without_mlp=frozenset(i for i in draft.without_mlp if not self.protected.keeps_mlp(i)),
        )

    def _make_plans(self, keep_rate: float, merge_start: int, without: frozenset[int]) -> Mapping[int, TokenPlan]:
        """Token plans of the blocks from ``merge_start`` on, but for those ``without`` attention."""
        blocks = (i for i in range(merge_start, self.arch.depth) if i not in without)
        merging = [i for i in blocks if not self.protected.keeps_tokens(i)]
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

    def _make_path(self, draft: Draft) -> WidthPath:
        mixers, scores = dict(draft.mixers), self.scores[draft.method]
        weighted = {name: vector * draft.weight(name) for name, vector in scores.vectors.items()}
        return width_path(
            self.arch,
            dataclasses.replace(scores, vectors=weighted),
            dropped=sorted(draft.dropped),
            groups=self._groups,
            mixers=mixers,
            tokens=self._plans(draft.keep_rate, draft.merge_start, draft.dropped | set(mixers)),
            without_mlp=sorted(draft.without_mlp),
            least=self.table.budget[0] * self.source_cost.macs,
            protected=self.protected,
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
        paths = [self._path(self._draft(point)) for point in self._corners()]
        widest = max(p.costs[p.step_for(high)] if p.costs[-1] <= high else 0 for p in paths)
        return min(p.costs[-1] for p in paths) / macs, widest / macs

    def _corners(self) -> list[Params]:
        """Axes that change the cost at their lowest and their highest value, all others at their first one."""
        ends: dict[str, list[float | int | str]] = {}
        for v in self.variables:
            corner = not v.fixed and v.name in AXES and AXES[v.name].changes_cost
            ends[v.name] = [_whole(v, v.low), _whole(v, v.high)] if corner else [v.first]
        return [dict(zip(ends, values, strict=True)) for values in product(*ends.values())]

    def summarise(self, sample: int, seed: int) -> Summary:
        """Cost of ``sample`` points, drawn uniformly and placed, without those that cannot be built."""
        random, feasible, found = Random(seed), [], []
        for _ in range(sample):
            point = self.placed({v.name: v.draw(random) for v in self.variables if not v.fixed})
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
            macs=Range.of([c.cost.macs for c in found]),
            params=Range.of([c.cost.params for c in found]),
            latency_ms=Range.of(latencies) if latencies else None,
            distinct=self._distinct(feasible, found),
            reachable=self.reachable,
            feasible=len(feasible) / sample,
            points=tuple(feasible),
        )

    def _distinct(self, points: Sequence[Params], found: Sequence[Candidate]) -> int:
        """Count the candidates that are not one and the same."""
        seen, distinct = set[str](), 0
        for point, candidate in zip(points, found, strict=True):
            names = candidate_names(candidate.key, candidate.arch.hash, self.complete(point))
            distinct += seen.isdisjoint(names)
            seen.update(names)
        return distinct


def _with_protected(protected: Protection, scores: Scores) -> Scores:
    """Scores by which no protected block is the next to be dropped."""
    depth = scores.vectors.get("depth")
    if not protected or depth is None:
        return scores
    depth = depth.clone()
    depth[[i for i in range(len(depth)) if protected.stays(i)]] = math.inf
    return dataclasses.replace(scores, vectors={**scores.vectors, "depth": depth})


def _is_choice(variable: Variable) -> bool:
    """Whether a variable has no values between two of them."""
    return bool(variable.choices) or (variable.whole and variable.high - variable.low == 1)


def _whole(variable: Variable, value: float) -> float | int:
    return int(value) if variable.whole else value


def read_scores(folder: Path, files: Mapping[str, str]) -> dict[str, Scores]:
    """Read a run's scores.

    Args:
        folder: the run's folder of scores.
        files: file names by the scores' names, as ``run.json`` lists them.

    Raises:
        UserError: a file is missing or damaged.
    """
    remedy = "put a file of that name from scores/ of the cache (--cache) in its place, or start a new search"
    return {name: Scores.load(folder / file, remedy) for name, file in files.items()}
