"""Optuna's study on disk: it proposes points and remembers what they gave. One driver writes; units never open it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from prunesweep.search.proposals.budget_gp import propose
from prunesweep.search.space.variables import Params

from .front import TWO, directions
from .run import Result

__all__ = ["SAMPLERS", "Study", "make_sampler", "resolve"]

NAME = "r0"
SAMPLERS = ("auto", "excess", "tpe", "nsga2", "nsga3", "gp", "qmc", "random")
MANY = 1500  # trials from which a proposal of TPE takes longer than it is worth


def resolve(name: str, distributions: Mapping[str, BaseDistribution], trials: int) -> str:
    """The sampler that ``auto`` stands for.

    ``excess`` (``search.proposals``) where the budget varies; without that, TPE, or for more than ``MANY`` trials
    NSGA-II, as every proposal of TPE takes longer than the one before.
    """
    if name != "auto":
        return name
    if "budget" in distributions:
        return "excess"
    return "tpe" if trials <= MANY else "nsga2"


def make_sampler(name: str, distributions: Mapping[str, BaseDistribution], trials: int, seed: int) -> BaseSampler:
    """Optuna's sampler of this name. ``qmc`` draws categorical variables independently."""
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
    """Objectives of mixed directions. Open it only while holding the run's lease.

    Args:
        journal: Optuna's journal file; a torn last line is cut off.
        distributions: the variables.
        seed: of the proposals; together with the number of trials that are there already.
        objectives: names, in the order of ``tell``'s values.
        sampler: one of ``SAMPLERS``.
        trials: how many proposals are planned.
        start: points to propose first, by variables; those that were proposed already are left out.
    """

    def __init__(
        self,
        journal: Path,
        distributions: Mapping[str, BaseDistribution],
        seed: int,
        *,
        objectives: Sequence[str] = TWO,
        sampler: str = "auto",
        trials: int = 0,
        start: Sequence[Params] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _repair(journal)
        self._distributions = dict(distributions)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            study_name=NAME, storage=storage, directions=directions(objectives), load_if_exists=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(objectives))  # for optuna-dashboard
        # a sampler keeps its random state in memory: after a resume it must not draw the same points again
        state = np.random.SeedSequence([seed, len(study.get_trials(deepcopy=False))])
        own = resolve(sampler, self._distributions, trials)
        self._excess, self._seed = own == "excess", seed
        first = "random" if self._excess else own  # every point of excess is put into the queue before it is asked for
        study.sampler = make_sampler(first, self._distributions, trials, int(state.generate_state(1)[0]))
        for point in start:
            study.enqueue_trial({n: v for n, v in point.items() if n in distributions}, skip_if_exists=True)
        self._study = study

    def ask(self, results: Sequence[Result] = ()) -> tuple[int, dict[str, float | int | str]]:
        """Number and point of a new trial; ``results``, of all rungs, are what ``excess`` learns from."""
        if self._excess and not self.count(TrialState.WAITING):
            number = self.count(*TrialState)
            self._study.enqueue_trial(propose(self._distributions, results, number, self._seed))
        trial = self._study.ask(self._distributions)
        return trial.number, dict(trial.params)

    def tell(self, number: int, values: Sequence[float]) -> None:
        """Finish a trial; does nothing where it is finished already."""
        self._study.tell(number, list(values), skip_if_finished=True)

    def fail(self, number: int) -> None:
        """Finish a trial without values."""
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def prune(self, number: int) -> None:
        """Take back a proposal that is no candidate."""
        self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def count(self, *states: TrialState) -> int:
        """Trials in any of these states."""
        return len(self._study.get_trials(deepcopy=False, states=states))

    def running(self) -> dict[int, dict[str, float | int | str] | None]:
        """Trials that were asked for and not told, with their points; None where the driver died while asking."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        complete = set(self._distributions)
        return {t.number: dict(t.params) if set(t.params) == complete else None for t in trials}


def _repair(journal: Path) -> None:
    """Cut a torn last line, which would make every later read fail, and break the dead driver's lock."""
    if not journal.exists():
        return
    data = journal.read_bytes()
    if data and not data.endswith(b"\n"):
        warnings.warn(f"{journal}: the last line was torn by a kill; it is cut off", stacklevel=2)
        os.truncate(journal, data.rfind(b"\n") + 1)
    Path(f"{journal}.lock").unlink(missing_ok=True)
