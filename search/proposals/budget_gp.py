"""An Optuna sampler for searches that know the cost of a candidate before it is trained.

A sampler for two objectives has to learn both. Costs need no learning: here a budget is fixed first, evenly over the
window, and one objective is left, the quality at that budget on the highest rung. A Gaussian process learns it from the
results of all rungs at once (``gaussian_process``). The proposal is the point with the highest upper confidence bound,
mean + standard deviation, among random points and mutations of the best known ones at about that budget.
``benchmarks/search_quality.py`` compares this with other samplers.
"""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from prunesweep.search.space.variables import Params

from .encoder import SearchSpaceEncoder
from .evaluations import FEW, Evaluations, standardised, thinned
from .gaussian_process import GaussianProcess, Observations, learn

__all__ = [
    "CANDIDATE",
    "EXPLORE",
    "GOLDEN",
    "RUNG",
    "BudgetGPSampler",
    "log_error",
    "log_nats",
    "log_perplexity",
    "propose",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RUNG, CANDIDATE = "rung", "candidate"  # user attributes of a trial
EXPLORE = 7  # every so many proposals, one is random; steps of a Fibonacci number would stay at about one budget
IDLE = 0.75  # share of a random point's variables that do nothing
CROWD = 64  # number of proposals whose candidates may be running
GOLDEN = (5**0.5 - 1) / 2  # steps that cover an interval evenly, however many there are
MOST, LEARN = 200, 100  # number of results for a proposal, and for its hyperparameters
REFIT = 8  # hyperparameters are learned anew once there is 1 / REFIT more candidates
ROUNDS, WIDE, LOCAL, BEST = 5, 200, 100, 10  # of the local search: rounds, first and later points, points to mutate
SUM_WEIGHT = 0.05  # weight of the sum in Knowles' augmented Chebyshev function


def log_error(top1: Floats) -> Floats:
    """Return -log(max(100 - top1, 0.1)) of accuracies in percent, an (n,) array: the negated log error."""
    return np.asarray(-np.log(np.maximum(100 - top1, 0.1)))


def log_nats(nats: Floats) -> Floats:
    """Return -log(max(x, 1e-4)) of losses or divergences in nats, an (n,) array."""
    return np.asarray(-np.log(np.maximum(nats, 1e-4)))


def log_perplexity(ppl: Floats) -> Floats:
    """Return -log(ppl) of perplexities, an (n,) array."""
    return np.asarray(-np.log(ppl))


class BudgetGPSampler(BaseSampler):
    """Sample a budget evenly, and the other variables by a Gaussian process over the results of all rungs.

    It serves any study. Its random numbers follow from ``seed`` and the trial's number alone, so that a study that is
    opened again continues as if it had never been closed.

    It learns from the finished trials with values of the study that asks, or of ``results``. Two user attributes of a
    trial describe the evaluation: ``rung`` (0 by default) is its fidelity, and ``candidate`` (the trial's number by
    default) is the candidate that it evaluates. One candidate may have a trial on every rung. A trial that has a
    ``rung`` counts in any finished state: a pruned one still has values, a failed one has none. Values that are not
    finite count as worse than all others. Running trials of the study are pending: their points are not proposed again,
    nor are those of finished ones.

    Args:
        search_space: the variables; by default those that all finished trials of the study have in common, so that a
            first trial is sampled variable by variable.
        seed: seed of the random numbers; a random one by default.
        budget: the variable that decides what a candidate costs. It takes values evenly over its range whatever the
            results are. By default there is none, and all variables are sampled alike.
        quality: index of the one objective that has to be learned; the others are costs, which follow from the budget.
            By default all are learned: if there are several, every trial optimises a random weighting of them (ParEGO,
            Knowles 2006, equation 2).
        scale: function that maps the (n,) qualities to a scale on which they are additive and larger is better; by
            default the quality itself, negated if it is minimised.
        results: another study, whose trials are learned from instead of those of the study that asks.
        fit: function that moves a point to one that can be built at its budget; the best are searched for among those.
        idle: values that do nothing, of the variables that have one. ``IDLE`` of the variables of a random point have
            it, because a point all of whose variables do something is rarely worth a look.
    """

    def __init__(
        self,
        search_space: Mapping[str, BaseDistribution] | None = None,
        *,
        seed: int | None = None,
        budget: str | None = None,
        quality: int | None = None,
        scale: Callable[[Floats], Floats] | None = None,
        results: Study | None = None,
        fit: Callable[[Params], Params] | None = None,
        idle: Params | None = None,
    ) -> None:
        self._search_space = None if search_space is None else dict(search_space)
        self._seed = _any_seed() if seed is None else seed
        self._budget, self._quality, self._scale, self._results = budget, quality, scale, results
        self._fit, self._idle = fit, idle
        self._intersection = IntersectionSearchSpace()
        self._warned = False
        self._read: _Read | None = None

    def reseed_rng(self) -> None:
        """Draw another seed; Optuna calls this if several processes share a sampler."""
        self._seed = _any_seed()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the variables that are sampled together.

        Args:
            study: the study that asks.
            trial: the new trial.
        """
        if self._search_space is not None:
            return dict(self._search_space)
        return {name: d for name, d in self._intersection.calculate(study).items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a point for the trial, by the variables of ``search_space``.

        Args:
            study: the study that asks.
            trial: the new trial; its number seeds the random numbers.
            search_space: the variables that are sampled together.
        """
        if not search_space:
            return {}
        encoder = SearchSpaceEncoder(search_space)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        pending = [t.params for t in running if t.number != trial.number and search_space.keys() <= t.params.keys()]
        evaluations = self._evaluations(study, encoder, trial.number)
        with _one_thread():
            return propose(
                encoder,
                evaluations,
                trial.number,
                self._seed,
                budget=self._budget,
                pending=encoder.rows(pending),
                fit=self._fit,
                idle=self._idle,
            )

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value of one variable that is not sampled together with the others.

        Args:
            study: the study that asks.
            trial: the new trial.
            param_name: the variable.
            param_distribution: its range.
        """
        rng = np.random.default_rng([self._seed, trial.number, zlib.crc32(param_name.encode())])
        encoder = SearchSpaceEncoder({param_name: param_distribution})
        return encoder.point(encoder.random(rng, 1)[0])[param_name]

    def _evaluations(self, study: Study, encoder: SearchSpaceEncoder, number: int) -> Evaluations:
        """Return the trials' evaluations of points of the space."""
        source = study if self._results is None else self._results
        if self._read is None or not self._read.serves(source, encoder):
            self._read = _Read(source, encoder)
        found = self._read.go_on(source)
        qualities = self._qualities(found.values, source.directions, number)
        known = Evaluations.ordered(found.rows, found.rungs, found.candidates, qualities)
        if not self._warned and not np.isfinite(known.values).all():
            self._warned = True
            warnings.warn("a quality is not a finite number: it counts as worse than all others", stacklevel=2)
        return known.take(encoder.inside(known.rows))

    def _qualities(self, values: Floats, directions: Sequence[StudyDirection], number: int) -> Floats:
        """Return (n,) qualities of (n, m) values: larger is better, -inf where one is not a finite number."""
        index = 0 if len(directions) == 1 else self._quality
        finite: NDArray[np.bool_] = np.isfinite(values if index is None else values[:, [index]])
        bad: NDArray[np.bool_] = np.logical_not(finite.all(axis=1))
        signs = np.array([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in directions])
        usable = np.where(bad[:, None], 1.0, values)
        if index is None:
            weights = np.random.default_rng([self._seed, number, 1]).dirichlet(np.ones(len(directions)))
            found = _weighted(usable * signs, bad, weights)
        elif self._scale is not None:
            found = self._scale(usable[:, index])
        else:
            found = usable[:, index] * signs[index]
        return np.where(bad, -np.inf, found)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute by one thread: the matrices are small, and several wait for each other where others work too.

    On two busy cores a proposal took 18 s with two threads, and 0.05 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Columns(NamedTuple):
    """Trials as arrays: numbers (n,), encoded points (n, V), rungs (n,), candidates (n,), values (n, objectives)."""

    numbers: NDArray[np.int64]
    rows: Floats
    rungs: NDArray[np.int64]
    candidates: NDArray[np.int64]
    values: Floats

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial], encoder: SearchSpaceEncoder, objectives: int) -> _Columns:
        values = np.array([t.values or [np.nan] * objectives for t in trials], float)
        return cls(
            np.array([t.number for t in trials], np.int64),
            encoder.rows([t.params for t in trials]),
            np.array([t.user_attrs.get(RUNG, 0) for t in trials], np.int64),
            np.array([t.user_attrs.get(CANDIDATE, t.number) for t in trials], np.int64),
            values.reshape(-1, objectives),
        )

    def with_more(self, other: _Columns) -> _Columns:
        return _Columns._make(np.concatenate(pair) for pair in zip(self, other, strict=True))

    def in_order(self) -> _Columns:
        """Sort by number."""
        order = np.argsort(self.numbers, kind="stable")
        return _Columns._make(column[order] for column in self)


class _Read:
    """What was read of a study's finished trials, which never change: of a long search, only few are new.

    Args:
        study: the study.
        encoder: the variables of the trials that count.
    """

    def __init__(self, study: Study, encoder: SearchSpaceEncoder) -> None:
        self._storage, self._id = study._storage, study._study_id
        self._encoder, self._objectives = encoder, len(study.directions)
        self._seen, self._open = 0, list[int]()  # how many were looked at, and of them those that had not finished
        self.columns = _Columns.of([], encoder, self._objectives)

    def serves(self, study: Study, encoder: SearchSpaceEncoder) -> bool:
        """Whether it is of that study and those variables."""
        same = self._storage is study._storage and self._id == study._study_id
        return same and self._encoder.space == encoder.space

    def go_on(self, study: Study) -> _Columns:
        """Read what has finished since; return all, in the order of the trials."""
        trials = study.get_trials(deepcopy=False)
        looked = [*(trials[number] for number in self._open), *trials[self._seen :]]
        self._seen, self._open = len(trials), [t.number for t in looked if not t.state.is_finished()]
        new = [t for t in looked if _counts(t) and set(self._encoder.names) <= t.params.keys()]
        if new:
            more = _Columns.of(new, self._encoder, self._objectives)
            self.columns = self.columns.with_more(more).in_order()
        return self.columns


def _any_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1)[0])


def _counts(trial: FrozenTrial) -> bool:
    """Return True if a trial is an evaluation."""
    return trial.state == TrialState.COMPLETE or (trial.state.is_finished() and RUNG in trial.user_attrs)


def _weighted(gains: Floats, bad: NDArray[np.bool_], weights: Floats) -> Floats:
    """Return the negated augmented Chebyshev function of (n, m) gains, which are scaled to the unit cube.

    Source: ParEGO, Knowles 2006, equation 2: max_k w_k f_k + 0.05 sum_k w_k f_k, for losses f in [0, 1].
    """
    if bad.all():
        return np.zeros(len(gains))
    low, high = gains[~bad].min(axis=0), gains[~bad].max(axis=0)
    losses = weights * (high - gains) / np.maximum(high - low, 1e-12)
    return np.asarray(-(losses.max(axis=1) + SUM_WEIGHT * losses.sum(axis=1)))


def propose(
    encoder: SearchSpaceEncoder,
    evaluations: Evaluations,
    number: int,
    seed: int,
    *,
    budget: str | None = "budget",
    pending: Floats | None = None,
    fit: Callable[[Params], Params] | None = None,
    idle: Params | None = None,
) -> dict[str, Any]:
    """Return the point of a proposal; equal arguments give equal points.

    Args:
        encoder: the variables.
        evaluations: all evaluations, of any rung.
        number: how many proposals there were before.
        seed: seed of the search.
        budget: the variable that decides the cost. If it is not among the variables, the quality alone counts.
        pending: (p, V) rows of candidates that are being evaluated.
        fit: moves a point to one that can be built at its budget; a random proposal is not moved.
        idle: as for ``BudgetGPSampler``.
    """
    plain = encoder.partial_row(idle or {})
    rng = np.random.default_rng([seed, number])
    fixed = {encoder.names.index(budget): number * GOLDEN % 1} if budget in encoder.names else {}
    known = standardised(evaluations)
    candidates = len(np.unique(evaluations.candidates))
    started = candidates >= 2 * len(encoder.names)
    crowded = number > 4 * candidates + CROWD  # most proposals were no new candidates: random points find one sooner
    free = np.array([v for v in range(len(encoder.names)) if v not in fixed], dtype=np.int64)
    taken = np.vstack([evaluations.rows, *([] if pending is None else [pending])])
    if crowded or not started or not len(known) or not len(free) or number % EXPLORE == EXPLORE - 1:
        return encoder.point(_drawn(encoder, rng, fixed, taken, plain))
    known = known.take(thinned(known.rungs, MOST, _distance(known.rows, fixed)))
    top = int(known.rungs.max())
    process = GaussianProcess(_observed(encoder, known), _learned(encoder, evaluations, top + 1))
    near = _best_near(known, fixed)
    rows = np.vstack(
        [
            _sparse(rng, encoder.random(rng, WIDE // 2), plain),
            encoder.mutated(rng, near[rng.integers(len(near), size=WIDE // 2)], free, plain),
        ]
    )
    for _ in range(ROUNDS):
        rows = _at(rows, fixed)
        mean, deviation = process.predict(encoder.features(rows), top)
        best = rows[np.argsort(-(mean + deviation), kind="stable")[:BEST]]
        if fit is not None:
            best = encoder.rows([fit(encoder.point(row)) for row in best])
        more = encoder.mutated(rng, best[rng.integers(len(best), size=LOCAL)], free, plain)
        more[: LOCAL // 2] = _sparse(rng, more[: LOCAL // 2], plain)
        rows = np.vstack([best, more])
    found = next((row for row in best if _is_free(row, taken)), None)
    return encoder.point(_drawn(encoder, rng, fixed, taken, plain) if found is None else found)


def _drawn(
    encoder: SearchSpaceEncoder, rng: np.random.Generator, fixed: Mapping[int, float], taken: Floats, plain: Floats
) -> Floats:
    """Draw a (V,) row that is not taken; any row where the space seems to be exhausted."""
    for _ in range(WIDE):
        row = _at(_sparse(rng, encoder.random(rng, 1), plain), fixed)[0]
        if _is_free(row, taken):
            break
    return row


def _sparse(rng: np.random.Generator, rows: Floats, plain: Floats) -> Floats:
    """Return (n, V) rows, ``IDLE`` of whose columns are those of a (V,) row that is NaN where any value may be."""
    if np.isnan(plain).all():
        return rows
    return np.where((rng.random(rows.shape) < IDLE) & ~np.isnan(plain), plain, rows)


def _is_free(row: Floats, taken: Floats) -> bool:
    """Return True if a row is not among those taken."""
    return not bool((abs(taken - row).max(axis=1) < 1e-9).any())


def _learned(encoder: SearchSpaceEncoder, evaluations: Evaluations, rungs: int) -> Tensor | None:
    """Return hyperparameters; learning takes time, so they are learned anew only once there is an eighth more data."""
    trials = np.unique(evaluations.candidates)
    settled = trials[: len(trials) - len(trials) % max(len(trials) // REFIT, 1)]
    known = standardised(evaluations.take(np.isin(evaluations.candidates, settled)))
    if not len(known):
        return None
    order = np.random.default_rng(len(settled)).random(len(known))  # the same until they are learned anew
    some = _observed(encoder, known.take(thinned(known.rungs, LEARN, order)))
    arrays = (some.inputs, some.rungs, some.candidates, some.values)
    return _learn(tuple(encoder.groups), rungs, *(array.tobytes() for array in arrays))


@lru_cache(maxsize=8)
def _learn(
    groups: tuple[int, ...], rungs: int, inputs: bytes, of_rungs: bytes, candidates: bytes, values: bytes
) -> Tensor:
    """Call ``learn``; cache its result by the content of the arrays."""
    known = Observations(
        inputs=np.frombuffer(inputs).reshape(-1, len(groups)).copy(),
        groups=groups,
        rungs=np.frombuffer(of_rungs, np.int64).copy(),
        candidates=np.frombuffer(candidates, np.int64).copy(),
        values=np.frombuffer(values).copy(),
    )
    return learn(known, rungs)


def _observed(encoder: SearchSpaceEncoder, known: Evaluations) -> Observations:
    return Observations(encoder.features(known.rows), encoder.groups, known.rungs, known.candidates, known.values)


def _at(rows: Floats, fixed: Mapping[int, float]) -> Floats:
    """Set some columns of rows to fixed values in place, and return the rows."""
    for v, value in fixed.items():
        rows[:, v] = value
    return rows


def _distance(rows: Floats, fixed: Mapping[int, float]) -> Floats:
    """Return (n,) distances of rows from the fixed budget."""
    return np.asarray(sum((abs(rows[:, v] - value) for v, value in fixed.items()), np.zeros(len(rows))))


def _best_near(known: Evaluations, fixed: Mapping[int, float]) -> Floats:
    """Return the rows of the best evaluations near the budget, on each of the two highest rungs."""
    found = []
    for rung in sorted(set(known.rungs.tolist()), reverse=True)[:2]:
        own = known.take(np.flatnonzero(known.rungs == rung))
        near = own.take(np.argsort(_distance(own.rows, fixed), kind="stable")[: max(FEW, len(own) // 4)])
        found.append(near.rows[np.argsort(-near.values, kind="stable")[:FEW]])
    return np.vstack(found)
