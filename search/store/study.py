"""Keep Optuna's studies of a search on disk. One driver writes them; tasks never open them.

The journal has two studies. ``proposals`` has a trial for every point that the sampler proposed. Its number is the
candidate's, it is running while the candidate's first task is, and its values are what candidates are compared by
(``Ranking``) on the first rung, from which Optuna's own samplers learn. ``results`` has a finished trial for every
result on every rung, with the result's figures as user attributes. It is the study to look at in optuna-dashboard,
where its best trials are the front of the search, and our own sampler learns from it.

There are two studies because a finished trial cannot be changed. If a candidate's trial stayed running until its last
rung, samplers would learn nothing before the search ends, as promotions are due at any time. If results of higher
rungs were added to the proposals, the numbers of proposals would no longer be the candidates'. ``results`` follows
from the tasks' files: what is missing there, in a journal of an older version too, is added when a search is resumed.

The tasks' files are the truth. A journal that cannot be read, or that is not of the same candidates as they are (one
copied from a running search, or from another one, or a part of it), is set aside, and both studies are made again. So
are those in a database, which may take the journal's place (``study_places``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from prunesweep.models import UserError
from prunesweep.search.proposals.budget_gp import (
    CANDIDATE,
    RUNG,
    BudgetGPSampler,
    log_error,
    log_nats,
    log_perplexity,
)
from prunesweep.search.proposals.placing import PlacingSampler
from prunesweep.search.space.variables import MODEL, Params

from .front import TWO, RankBy, Ranking, comparable, directions, latest, quality_of
from .run import Result, Task
from .study_places import Database, JournalFile, Place

__all__ = ["PROPOSALS", "RESULTS", "SAMPLERS", "Study", "make_sampler", "resolve"]

PROPOSALS, RESULTS = "proposals", "results"
OLDER = "r0"  # former name of the study of proposals
SAMPLERS = ("auto", "budget_gp", "tpe", "nsga2", "nsga3", "gp", "qmc", "random")
MANY = 1500  # more trials than this make proposals of TPE too slow
SCALES: dict[str, Any] = {
    "top1": log_error,
    "balanced": log_error,
    "ppl": log_perplexity,
    "agreement": log_error,
    "kl": log_nats,
    "loss": log_nats,
    "quality": None,  # as it is, negated where lower is better
    "error": None,
}
NOTES = {
    PROPOSALS: "Every point that the sampler of search **{run}** proposed. Values are those of the first rung; a "
    "pruned trial was no new candidate. What candidates gave in the end is in the study `results`.",
    RESULTS: "Every result of search **{run}**, on every rung. The best trials are the front, as `prunesweep front` "
    "shows it. User attributes say which candidate and rung a trial is of, how long it was finetuned, and where its "
    "model is: models that are on no front are deleted as the search goes. A pruned trial only screened its candidate, "
    "and has no model, or, once the search has ended, a later one of its candidate replaced it; a failed "
    "one gave no number.",
}


def resolve(name: str, distributions: Mapping[str, BaseDistribution], trials: int) -> str:
    """Return the name of the sampler that ``auto`` stands for.

    This is ``budget_gp`` (``search.proposals``) if the budget varies; otherwise TPE, or NSGA-II for more than ``MANY``
    trials, because every proposal of TPE takes longer than the one before.

    Args:
        name: one of ``SAMPLERS``; any but ``auto`` is returned as it is.
        distributions: the variables.
        trials: how many proposals are planned.
    """
    if name != "auto":
        return name
    if "budget" in distributions:
        return "budget_gp"
    return "tpe" if trials <= MANY else "nsga2"


def make_sampler(name: str, distributions: Mapping[str, BaseDistribution], trials: int, seed: int) -> BaseSampler:
    """Make one of Optuna's samplers. ``qmc`` draws categorical variables independently.

    Args:
        name: one of ``SAMPLERS``, except ``auto`` and ``budget_gp``.
        distributions: the variables.
        trials: how many proposals are planned; gives the genetic samplers' population size.
        seed: seed of the proposals.

    Raises:
        UserError: there is no such sampler.
    """
    if name == "excess":
        raise UserError("sampler 'excess' is now called 'budget_gp'")
    if name not in SAMPLERS[2:]:
        raise UserError(f"sampler {name!r} is none; known: {', '.join(SAMPLERS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        start = max(3 * len(distributions), 10)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=start, multivariate=True)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=start)
        if name == "qmc":
            return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        genetic = {"nsga2": optuna.samplers.NSGAIISampler, "nsga3": optuna.samplers.NSGAIIISampler}[name]
        numbers = not any(isinstance(d, CategoricalDistribution) for d in distributions.values())
        crossover = {"crossover": optuna.samplers.nsgaii.SBXCrossover()} if numbers else {}
        return genetic(seed=seed, population_size=min(50, max(10, trials // 5)), **crossover)


class Study:
    """Proposals and results of a search, for objectives of mixed directions.

    Open it only while holding the run's lease.

    Args:
        journal: Optuna's journal file; a torn last line is cut off, a file that is damaged elsewhere is set aside. Or
            a database.
        distributions: the variables.
        seed: seed of the proposals; Optuna's samplers combine it with the number of existing trials.
        objectives: names, in the order of ``tell``'s values.
        rank_by: what stands in ``tell``'s values for the quality among them, as for ``Ranking``.
        rungs: epochs of the rungs; say which measure is shown as the value of a trial.
        sampler: one of ``SAMPLERS``.
        trials: how many proposals are planned.
        start: points to propose first, by variables; those that were proposed already are left out.
        name: name of the run, shown with the studies; that of the journal's folder by default.
        fit: as for ``BudgetGPSampler``.
        place: gives the point that takes the place of a proposal (``Space.placed``); points to start from stay.
        idle: as for ``BudgetGPSampler``.

    Attributes:
        notes: lines for people: what was wrong with the journal, and what was done about it.
        ranking: what candidates are compared by.

    Raises:
        UserError: there is no such sampler.
    """

    def __init__(
        self,
        journal: Path | Database,
        distributions: Mapping[str, BaseDistribution],
        seed: int,
        *,
        objectives: Sequence[str] = TWO,
        rank_by: RankBy = "objective",
        rungs: Sequence[int] = (),
        sampler: str = "auto",
        trials: int = 0,
        start: Sequence[Params] = (),
        name: str | None = None,
        fit: Callable[[Params], Params] | None = None,
        place: Callable[[Params], Params] | None = None,
        idle: Params | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._where: Place = JournalFile(journal) if isinstance(journal, Path) else journal
        self._seed, self._sampler, self._planned = seed, sampler, trials
        self._distributions, self._start = dict(distributions), start
        self._fit, self._place, self._idle = fit, place, idle
        self.ranking = Ranking(tuple(objectives), rank_by)
        ends = (rungs[0], rungs[-1]) if rungs else (1, 1)
        self._names = {
            kind: self.ranking.names(epochs) for kind, epochs in zip((PROPOSALS, RESULTS), ends, strict=True)
        }
        self._run = name or (journal.absolute().parent.name if isinstance(journal, Path) else "")
        self.notes = self._where.repair()
        try:
            self._load()
        except (UserError, OSError):
            raise
        except Exception as error:  # records that contradict each other: Optuna checks nothing and raises anything
            self.notes.append(self._where.aside(f"{type(error).__name__}: {error}"))
            self._forget()
            self._load()

    def _forget(self) -> None:
        """Begin without what cannot be read; a journal has been set aside already."""
        if isinstance(self._where, Database):
            with self._where.anew():
                pass

    def _load(self) -> None:
        """Open the studies of the journal, or create them, and make the sampler."""
        self._study, self._results = self._open(self._where.open())
        self._known = {t.user_attrs.get("unit") for t in self._results.get_trials(deepcopy=False)}
        name = resolve(self._sampler, self._distributions, self._planned)
        sampler = self._make_sampler(name, self._planned, self._seed)
        self._study.sampler = (
            sampler if self._place is None else PlacingSampler(sampler, self._distributions, self._place)
        )
        # these samplers need a trial's number alone
        self._at_once = isinstance(sampler, BudgetGPSampler)
        self._queued, self._waits = False, True

    def _open(self, storage: BaseStorage) -> tuple[optuna.Study, optuna.Study]:
        """Open or create proposals and results."""
        names = {study.study_name for study in storage.get_all_studies()}
        results = self._take(storage, self._where.called(RESULTS), RESULTS)
        stored = OLDER if OLDER in names else self._where.called(PROPOSALS)
        return self._take(storage, stored, PROPOSALS), results

    def _take(self, storage: BaseStorage, stored: str, kind: str) -> optuna.Study:
        study = _open(storage, stored, kind, self._names[kind], self._run, self._where)
        self._where.take(storage, study._study_id)
        return study

    def _queue(self) -> None:
        """Put the points to start from before all others, once."""
        if self._queued:
            return
        proposed = {trial.user_attrs.get(MODEL) for trial in self._study.get_trials(deepcopy=False)}
        for point in self._start:
            own = {n: v for n, v in point.items() if n in self._distributions}
            if MODEL not in point:
                self._study.enqueue_trial(own, skip_if_exists=True)
            elif point[MODEL] not in proposed:  # several models may have one nearest point
                self._study.enqueue_trial(own, user_attrs={MODEL: point[MODEL]})
        self._queued = True

    def _make_sampler(self, name: str, trials: int, seed: int) -> BaseSampler:
        if name != "budget_gp":
            # these keep their random state in memory: after a resume they must not draw the same points again
            state = np.random.SeedSequence([seed, len(self._study.get_trials(deepcopy=False))])
            return make_sampler(name, self._distributions, trials, int(state.generate_state(1)[0]))
        quality = self.ranking.objectives.index(quality_of(self.ranking.objectives))
        return BudgetGPSampler(
            self._distributions,
            seed=seed,
            budget="budget",
            quality=quality,
            scale=SCALES[self._names[RESULTS][quality]],
            results=self._results,
            fit=self._fit,
            idle=self._idle,
        )

    def ask(self) -> tuple[int, dict[str, float | int | str]]:
        """Start a trial; return its number and its point, with ``MODEL`` where a saved model goes with it."""
        self._where.check(self._study._storage, self._study._study_id)
        self._queue()
        if self._at_once and not self._has_waiting():
            return self._ask_at_once()
        with warnings.catch_warnings():  # what is told of candidates without a number is said elsewhere
            warnings.filterwarnings("ignore", message="Clip non-finite values")
            trial = self._study.ask(self._distributions)
        return trial.number, {**trial.params, **_model(trial.user_attrs)}

    def _has_waiting(self) -> bool:
        """Whether points to start from are left; nobody adds any later."""
        if self._waits:
            self._waits = bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        return self._waits

    def _ask_at_once(self) -> tuple[int, dict[str, float | int | str]]:
        """Start a trial by one entry of the journal; Optuna's ``ask`` writes one for every variable, too."""
        sampler, new = self._study.sampler, optuna.trial.create_trial(state=TrialState.RUNNING)
        new.number = len(self._study.get_trials(deepcopy=False))
        together = sampler.infer_relative_search_space(self._study, new)
        found = sampler.sample_relative(self._study, new, together)
        point = {name: _only(d) if d.single() else found[name] for name, d in self._distributions.items()}
        own: dict[str, Any] = {"params": point, "distributions": self._distributions}
        self._study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, **own))
        return new.number, point

    def tell(self, number: int, values: Sequence[float]) -> None:
        """Finish a trial; do nothing if it is finished already, unless it failed and was done again.

        A finished trial cannot be changed, so the values of one that failed are added as another trial of its point.

        Args:
            number: the trial.
            values: ``ranking.values`` of its result; where one is not finite, the trial is worse than all others.
        """
        told = self._told(values)
        trial = self._study.get_trials(deepcopy=False)[number]
        if trial.state == TrialState.FAIL:
            of: dict[str, Any] = {"params": trial.params, "distributions": trial.distributions}
            self._study.add_trial(optuna.trial.create_trial(values=told, **of))
        else:
            self._study.tell(number, told, skip_if_finished=True)

    def _told(self, found: Sequence[float]) -> list[float]:
        """What samplers learn from: infinitely bad in every objective, costs too, where one of them is not finite."""
        whole = all(map(math.isfinite, found))
        return list(found) if whole else list(comparable([math.nan] * len(found), self._names[PROPOSALS]))

    def fail(self, number: int) -> None:
        """Finish a trial as failed, without values."""
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def prune(self, number: int) -> None:
        """Withdraw a proposal that is not a new candidate."""
        self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def record(self, results: Iterable[Result]) -> None:
        """Add the results of finished tasks, on any rung, to ``results``; skip those that are there already."""
        for result in results:
            if result.id not in self._known:
                self._results.add_trial(self._trial_of(result))
                self._known.add(result.id)

    def settle(self, results: Sequence[Result]) -> None:
        """Make the best trials of ``results`` the front, once a search has ended.

        A trial that was complete when its candidate went on to the next rung cannot be changed. If one is best that its
        candidate's later result replaces, the study is made anew, with all that are replaced as pruned trials.

        Args:
            results: all results of the search.
        """
        current = {r.id for r in latest(results)}
        if all(trial.user_attrs["unit"] in current for trial in self._results.best_trials):
            return
        storage = self._results._storage
        optuna.delete_study(study_name=self._results.study_name, storage=storage)
        self._results = self._take(storage, self._where.called(RESULTS), RESULTS)
        for result in results:
            self._results.add_trial(self._trial_of(result, replaced=result.id not in current))

    def follow(
        self, tasks: Mapping[int, Task], results: Sequence[Result], failed: Collection[int], next_number: int
    ) -> None:
        """Make the journal agree with the files of a run's tasks; say in ``notes`` if it did not.

        Args:
            tasks: the tasks that were handed out on the first rung, by number.
            results: all results.
            failed: numbers of the candidates that failed on the first rung.
            next_number: the smallest number that may be proposed.

        Raises:
            UserError: a task's point is not in the space.
        """
        reason = self._disagreement(tasks, results, next_number)
        if reason is not None:
            self._rebuild(tasks, results, failed, next_number, reason)
        self.record(results)

    def _disagreement(self, tasks: Mapping[int, Task], results: Sequence[Result], next_number: int) -> str | None:
        """How the journal is not that of these files; None if it is."""
        proposed = self._study.get_trials(deepcopy=False)
        if len(proposed) < next_number:
            last = f"ends with trial {len(proposed) - 1}" if proposed else "has no trials"
            return f"{last}, but there are results or folders up to trial {next_number - 1}"
        ended = {r.trial: self._told(self.ranking.values(r)) for r in results if r.rung == 0}
        for number, task in tasks.items():
            trial = proposed[number]
            if trial.params != self._own(task.point):
                return f"has another point as trial {number}"
            if trial.state == TrialState.COMPLETE and trial.values != ended.get(number):
                return f"has a result of trial {number} that its files do not have"
        found = {r.id: self.ranking.values(r) for r in results}
        for trial in self._results.get_trials(deepcopy=False):
            unit = trial.user_attrs.get("unit")
            if unit not in found or trial.values not in (None, found[unit]):
                return f"has a result of {unit} that its files do not have"
        return None

    def _own(self, point: Params) -> dict[str, Any]:
        """The values of the variables that vary."""
        return {name: point.get(name) for name in self._distributions}

    def _rebuild(
        self,
        tasks: Mapping[int, Task],
        results: Sequence[Result],
        failed: Collection[int],
        next_number: int,
        reason: str,
    ) -> None:
        """Make the proposals again, each under its number; numbers without a task are withdrawn."""
        ended = {r.trial: self._told(self.ranking.values(r)) for r in results if r.rung == 0}
        replaces = bool(self._study.get_trials(deepcopy=False))
        with self._where.anew() as storage:
            study, _ = self._open(storage)
            for number in range(next_number):
                state, told = TrialState.RUNNING, ended.get(number)
                if number in failed:
                    state, told = TrialState.FAIL, None
                elif told is not None:
                    state = TrialState.COMPLETE
                elif number not in tasks:
                    state = TrialState.PRUNED
                study.add_trial(self._proposal(state, told, tasks.get(number)))
            if replaces:
                self.notes.append(self._where.aside(f"it {reason}", "outdated"))
            self.notes.append(f"{self._where.name} was made again from the files of {len(results)} results")
        self._load()

    def _proposal(self, state: TrialState, told: list[float] | None, task: Task | None) -> FrozenTrial:
        point = {} if task is None else self._own(task.point)
        of = {name: self._distributions[name] for name in point}
        try:
            return optuna.trial.create_trial(
                state=state,
                values=told,
                params=point,
                distributions=of,
                user_attrs={} if task is None or task.given is None else {MODEL: task.given},
            )
        except (TypeError, ValueError) as error:
            number = "" if task is None else f" {task.number}"
            raise UserError(f"trial{number} of {self._run} is not in the space of its search.toml: {error}") from error

    def _trial_of(self, result: Result, *, replaced: bool = False) -> FrozenTrial:
        """Return a finished trial with everything that is known about a result; pruned if a later one replaces it."""
        found = self.ranking.values(result)
        state = TrialState.COMPLETE if result.has_model and not replaced else TrialState.PRUNED
        state = state if all(map(math.isfinite, found)) else TrialState.FAIL
        trial = optuna.trial.create_trial(
            state=state,
            values=None if state == TrialState.FAIL else found,
            params={name: result.point[name] for name in self._distributions},
            distributions=self._distributions,
            user_attrs=_attributes(result),
        )
        if trial.datetime_start is not None and math.isfinite(result.seconds):
            trial.datetime_start -= timedelta(seconds=result.seconds)
        return trial

    def count(self, *states: TrialState) -> int:
        """Return the number of proposals that are in any of these states."""
        return len(self._study.get_trials(deepcopy=False, states=states))

    def running(self) -> dict[int, dict[str, float | int | str] | None]:
        """Return the points of the trials that were asked for and not told, by their number.

        A point is None if the driver died while asking for it.
        """
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        complete = set(self._distributions)
        return {t.number: {**t.params, **_model(t.user_attrs)} if set(t.params) == complete else None for t in trials}


def _only(values: BaseDistribution) -> Any:
    """The value of a variable that has only one."""
    return values.choices[0] if isinstance(values, CategoricalDistribution) else values.low  # type: ignore[attr-defined]


def _model(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What the attributes of a proposal say of the saved model that goes with its point."""
    return {MODEL: attributes[MODEL]} if MODEL in attributes else {}


def _attributes(result: Result) -> dict[str, Any]:
    """Return the user attributes of a result's trial; a figure that is not finite is None."""
    figures = {
        **result.figures.as_dict(),
        "zero_shot": result.zero_shot,
        "macs": result.macs,
        "params": result.params,
        **({} if result.latency_ms is None else {"latency_ms": result.latency_ms}),
        "seconds": result.seconds,
    }
    return {
        CANDIDATE: result.trial,
        RUNG: result.rung,
        "unit": result.id,
        "epochs": result.epochs,
        **{name: figure if math.isfinite(figure) else None for name, figure in figures.items()},
        "arch_hash": result.arch_hash,
        "model": f"trials/{result.id}/model" if result.has_model else None,
    }


def _open(storage: BaseStorage, stored: str, kind: str, names: Sequence[str], run: str, where: Place) -> optuna.Study:
    """Open a study, or create it, with the notes that dashboards show."""
    if stored in {study.study_name for study in storage.get_all_studies()}:
        study = optuna.load_study(study_name=stored, storage=storage)
        where.compare(study.user_attrs)
    else:
        study = optuna.create_study(study_name=stored, storage=storage, directions=directions(names))
    if study.user_attrs.get("run") == run:
        return study
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(names))
    study.set_user_attr("run", run)
    # optuna-dashboard keeps its notes under these keys
    storage.set_study_system_attr(study._study_id, "dashboard:note_ver", 1)
    storage.set_study_system_attr(study._study_id, "dashboard:note_str:0", NOTES[kind].format(run=run))
    return study
