"""The sampler on results that say nothing, or nearly so: it goes on, in range, without proposing a point twice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from prunesweep.search.proposals import BudgetGPSampler
from prunesweep.search.proposals.budget_gp import log_error, propose
from prunesweep.search.proposals.encoder import SearchSpaceEncoder
from prunesweep.search.proposals.evaluations import Evaluations

Point = dict[str, Any]
Space = dict[str, BaseDistribution]
Quality = Callable[[int, Point], float]
JOINT: Space = {
    "budget": FloatDistribution(0.1, 0.9),
    "skip": IntDistribution(0, 5),
    "lr": FloatDistribution(1e-5, 1e-2, log=True),
    "method": CategoricalDistribution(("a", "b", "c")),
}
SILENT: dict[str, Quality] = {  # nothing can be learned from them
    "all equal": lambda n, p: 80.0,
    "all at chance": lambda n, p: 10.0,
    "all perfect": lambda n, p: 100.0,
    "no number": lambda n, p: math.nan,
    "infinite": lambda n, p: math.inf,
}
TELLING: dict[str, Quality] = {
    "minus infinity but one": lambda n, p: 80.0 if n == 3 else -math.inf,
    "a tiny spread": lambda n, p: 80 + 1e-12 * p["skip"],
    "one outlier": lambda n, p: 1.0 if n == 3 else 80.0,
    "numbers of no sense": lambda n, p: (-1) ** n * 1e308,
    "the budget alone": lambda n, p: 100 * p["budget"],
    "a choice alone": lambda n, p: 80.0 if p["method"] == "b" else math.nan,
}


def search(space: Space, quality: Quality, count: int, **options: Any) -> list[Point]:
    """Points of a study that is told what ``quality`` says of its trials."""
    sampler = BudgetGPSampler(space, seed=0, budget="budget", quality=0, **options)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    points = []
    for number in range(count):
        trial = study.ask(space)
        points.append(dict(trial.params))
        value = quality(number, points[-1])
        if math.isnan(value):
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, [value, 1.0])
    return points


def check(space: Space, points: list[Point]) -> None:
    """Raise unless all points lie in the space and none is there twice."""
    for point in points:
        create_trial(params=point, distributions=space, value=0.0)  # raises where a value lies outside its range
    assert len({tuple(point.items()) for point in points}) == len(points)


@pytest.mark.parametrize("scale", [None, log_error])
@pytest.mark.parametrize("name", [*SILENT, *TELLING])
def test_degenerate_results_end_no_search(name: str, scale: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)  # of numpy: overflow, or what is no number
        warnings.filterwarnings("ignore", message="a quality is not a finite number")
        points = search(JOINT, {**SILENT, **TELLING}[name], 24, scale=scale)
    check(JOINT, points)
    if name in SILENT:  # all of the space is looked at
        assert {point["method"] for point in points[8:]} == {"a", "b", "c"}
        assert len({point["skip"] for point in points[8:]}) >= 4


SPACES: dict[str, Space] = {
    "a budget alone": {"budget": JOINT["budget"]},
    "a budget, all else fixed": {
        "budget": JOINT["budget"],
        "skip": IntDistribution(2, 2),
        "lr": FloatDistribution(1e-3, 1e-3, log=True),
        "method": CategoricalDistribution(("a",)),
    },
    "a budget and one choice": {"budget": JOINT["budget"], "method": JOINT["method"]},
    "one number": {"keep": FloatDistribution(0.5, 1.0)},
    "one choice": {"method": CategoricalDistribution(tuple("abcdefghijklmnop"))},
    "choices only": {"method": JOINT["method"], "mixer": CategoricalDistribution(tuple("abcdefgh"))},
    "whole numbers only": {"skip": IntDistribution(0, 3), "conv": IntDistribution(0, 6, step=2)},
}


@pytest.mark.parametrize("quality", [SILENT["all equal"], lambda n, p: -float(n % 3)], ids=["equal", "three values"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_smallest_spaces_are_searched_without_a_repetition(space: Space, quality: Quality) -> None:
    """Those of 16 or 24 points are proposed completely."""
    check(space, search(space, quality, 16))


def test_an_exhausted_space_is_searched_all_the_same() -> None:
    space = SPACES["whole numbers only"]
    points = search(space, SILENT["all equal"], 24)
    check(space, points[:16])
    assert all(0 <= point["skip"] <= 3 and point["conv"] in (0, 2, 4, 6) for point in points[16:])


def test_hundreds_of_results_of_one_point_are_no_obstacle() -> None:
    encoder = SearchSpaceEncoder(JOINT)
    one = encoder.rows([{"budget": 0.5, "skip": 2, "lr": 1e-3, "method": "b"}])
    count = 400
    known = Evaluations(
        np.repeat(one, count, axis=0), np.arange(count) // 200, np.arange(count), np.random.default_rng(0).random(count)
    )
    points = [propose(encoder, known, number, 0) for number in range(8)]
    check(JOINT, [encoder.point(one[0]), *points])


def test_one_result_or_none_is_no_obstacle() -> None:
    encoder = SearchSpaceEncoder(JOINT)
    rows = encoder.rows([{"budget": 0.5, "skip": 2, "lr": 1e-3, "method": "b"}])
    for count in (0, 1):
        known = Evaluations(rows[:count], np.zeros(count, int), np.arange(count), np.full(count, 0.3))
        check(JOINT, [propose(encoder, known, number, 0) for number in range(8)])
