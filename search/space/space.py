"""The search space: how a point becomes an architecture, and what can be said before any training.

A point has a value for every axis (``axes``). The axes say which blocks are dropped, which convolutions take the place
of attention and which tokens blocks work on; then widths are cut, by the scores of the source, until the budget is met
from below, within 0.5 % where units are fine enough. So the budget absorbs what the other axes cost or save. Decoding
is a pure function of the point and the cached scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from random import Random

from optuna.distributions import BaseDistribution

from prunesweep.models import Arch, Cost, Cut, LatencyTable, UserError, cost, cut_arch, read_arch
from prunesweep.models.io.provenance import digest
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.pruners import Scores, WidthPath, kind_of, pmvit, width_path
from prunesweep.pruners.reached import TOLERANCE
from prunesweep.pruners.subspaces import projected_groups
from prunesweep.search.config import SpaceTable

from .axes import AXES, TOKENS, Draft, ScoredSource, active_axes, variables
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
        self.table, self.arch, self.scores, self.source_cost = table, arch, scores, cost(arch)
        self._axes, self._source = active_axes(table), ScoredSource(arch, scores)
        self.variables = variables(table, self._source)
        self._groups = projected_groups(arch, table.group_sizes) if projected else table.group_sizes
        self._latency: Callable[[Arch], float] | None = None
        if table.latency_table is not None:
            self._latency = LatencyTable.load(Path(table.latency_table)).predict
            self._latency(arch)  # raises where the table is one of other models
        # per instance: lru_cache on a method would keep every space alive
        self._path = lru_cache(maxsize=256)(self._make_path)
        self._plans = lru_cache(maxsize=64)(self._make_plans)

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
        """The candidate of a point; of one with ``MODEL``, that model.

        Raises:
            UserError: its budget is below the narrowest architecture, it leaves no block, a window excludes it, or its
                model is not there, or of another kind than the source.
        """
        full = self.complete(point)
        decision = self._decision(point, full)
        arch = read_arch(decision) if isinstance(decision, Path) else cut_arch(self.arch, decision)
        if isinstance(decision, Path):
            self._check_given(arch)
        found = cost(arch)
        predicted = None if self._latency is None else self._latency(arch)
        for name, value in (("params", found.params), ("latency_ms", predicted)):
            window = getattr(self.table, name)
            if window is not None and not window[0] <= value <= window[1]:
                raise UserError(f"{name} = {value:g}: outside the window {list(window)}")
        return Candidate(decision, arch, found, predicted, candidate_key(decision, full))

    def _decision(self, point: Params, full: Params) -> Cut | Path:
        if MODEL in point:
            return Path(str(point[MODEL]))
        return self._path(self._draft(full)).reach(float(full["budget"]) * self.source_cost.macs).cut

    def _check_given(self, arch: Arch) -> None:
        """Raise UserError where a saved model cannot be a candidate, by its kind or by its MACs."""
        for name in ("family", "img_size", "in_chans", "num_classes", "text"):
            own, wanted = getattr(arch, name), getattr(self.arch, name)
            if own != wanted:
                raise UserError(f"{name} = {own!r}: the search's source has {wanted!r}")
        low, high = self.table.budget
        share = cost(arch).macs / self.source_cost.macs
        if not (1 - TOLERANCE) * low <= share <= high:
            raise UserError(f"{share:.4g} of the source's MACs: outside space.budget = {list(self.table.budget)}")

    def _draft(self, full: Params) -> Draft:
        draft = Draft()
        for axis in self._axes:
            draft = axis.apply(draft, full, self._source)
        if not draft.kept(self.arch.depth):
            raise UserError("all blocks are dropped: at least one must be kept")
        return draft

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

    def _make_path(self, draft: Draft) -> WidthPath:
        mixers, weights = dict(draft.mixers), dict(draft.weights)
        scores = self.scores[draft.method]
        weighted = {
            name: vector * weights[kind_of(name)] if kind_of(name) in weights else vector
            for name, vector in scores.vectors.items()
        }
        return width_path(
            self.arch,
            dataclasses.replace(scores, vectors=weighted),
            dropped=sorted(draft.dropped),
            groups=self._groups,
            mixers=mixers,
            tokens=self._plans(draft.keep_rate, draft.merge_start, draft.dropped | set(mixers)),
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
