"""Where to look next, for a search that knows what a candidate costs before it is trained.

A sampler for two objectives has to learn both. Costs need no learning: here a budget is fixed first, evenly over the
window, and one objective is left, by how much a result's accuracy exceeds the trend of all results at its MACs. TPE
learns it from the results whose MACs are nearest, on the highest rung that has enough of them
(``benchmarks/search_quality.py`` compares this with other ways).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import create_trial

from .run import Result

__all__ = ["EXPLORE", "excess", "propose"]

EXPLORE = 8  # one of so many proposals is random
GOLDEN = (5**0.5 - 1) / 2  # steps that cover an interval evenly, however many there are
MOST = 500  # results that one proposal learns from; a proposal of TPE takes time in proportion


def propose(
    distributions: Mapping[str, BaseDistribution], results: Sequence[Result], number: int, seed: int
) -> dict[str, float | int | str]:
    """A point for the proposal of this number; the same for the same arguments.

    Args:
        distributions: the variables, ``budget`` among them.
        results: all that is known, of any rung.
        number: how many proposals there were before.
        seed: of the search.
    """
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    enough = 2 * len(distributions)
    rungs: dict[int, list[Result]] = {}
    for result in results:
        rungs.setdefault(result.rung, []).append(result)
    known = next((rungs[rung] for rung in sorted(rungs, reverse=True) if len(rungs[rung]) >= enough), [])
    if not known or number % EXPLORE == EXPLORE - 1:
        return _ask(distributions, RandomSampler(own), {}, [])
    window = distributions["budget"]
    low, high = window.low, window.high  # type: ignore[attr-defined]  # a range of numbers
    budget = low + number * GOLDEN % 1 * (high - low)
    macs = float(np.median([r.macs / r.point["budget"] for r in known])) * budget
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = TPESampler(seed=own, multivariate=True, n_startup_trials=0)
        sampler = PartialFixedSampler({"budget": budget}, tpe)
    return _ask(distributions, sampler, excess(known, macs, enough), known)


def excess(known: Sequence[Result], macs: float, at_least: int) -> dict[int, float]:
    """By place in ``known``: top-1 above the trend, a parabola over log MACs, of the half nearest to ``macs``.

    Where there are perplexities, their logarithms take the place of top-1.
    """
    spent = np.log([r.macs / macs for r in known])
    top1 = np.array([r.top1 if r.ppl is None else -np.log(r.ppl) for r in known])
    degree = min(2, len(np.unique(spent)) - 1)
    above = top1 - np.polyval(np.polyfit(spent, top1, degree), spent)
    nearest = np.argsort(abs(spent), kind="stable")[: min(max(at_least, len(known) // 2), MOST)]
    return {int(i): float(above[i]) for i in nearest}


def _ask(
    distributions: Mapping[str, BaseDistribution],
    sampler: optuna.samplers.BaseSampler,
    values: Mapping[int, float],
    known: Sequence[Result],
) -> dict[str, float | int | str]:
    """A point from a study in memory that holds nothing but these results."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for i, value in values.items():
        params = {name: known[i].point[name] for name in distributions}
        study.add_trial(create_trial(params=params, distributions=dict(distributions), value=value))
    return dict(study.ask(dict(distributions)).params)
