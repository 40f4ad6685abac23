"""The sampler as Optuna drives it: Optuna's own conformance suite, resumes, pending trials, and results of no use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase
from optuna.trial import TrialState, create_trial

from prunesweep.search.proposals import BudgetGPSampler

SPACE = {
    "budget": FloatDistribution(0.2, 0.9),
    "skip": IntDistribution(0, 5),
    "method": CategoricalDistribution(("good", "bad")),
}


class TestConformance(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """All but ``SingleOnlySamplerTestCase``, which is for samplers that refuse several objectives."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return BudgetGPSampler


class TestConformanceWithBudget(RelativeSamplerTestCase):
    """The same where one of the variables decides the cost.

    The basic cases ask for variables of any name one by one; there is no budget among them.
    """

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: BudgetGPSampler(budget="x", quality=0, seed=0)


def quality(point: dict[str, Any]) -> float:
    return 80 + 10 * math.log(point["budget"]) - (point["skip"] - 4) ** 2 - 3 * (point["method"] == "bad")


def sampler(**options: Any) -> BudgetGPSampler:
    return BudgetGPSampler(SPACE, **{"seed": 0, "budget": "budget", "quality": 0, **options})


def ask(study: optuna.Study) -> dict[str, Any]:
    return dict(study.ask(SPACE).params)


def run(study: optuna.Study, trials: int, told: Callable[[dict[str, Any]], float] = quality) -> list[dict[str, Any]]:
    points = []
    for _ in range(trials):
        trial = study.ask(SPACE)
        study.tell(trial, [told(trial.params), 100 * trial.params["budget"]])
        points.append(dict(trial.params))
    return points


def new_study(sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def test_a_study_that_is_opened_again_goes_on_as_if_never_closed(tmp_path: Path) -> None:
    def reopened() -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
        return optuna.create_study(
            study_name="s", storage=storage, directions=["maximize", "minimize"], load_if_exists=True, sampler=sampler()
        )

    points = [point for _ in range(12) for point in run(reopened(), 2)]
    assert points == run(new_study(sampler()), 24)
    assert points != run(new_study(sampler(seed=1)), 24)


def test_without_a_seed_two_samplers_differ() -> None:
    first, second = (new_study(sampler(seed=None)) for _ in range(2))
    assert [ask(first) for _ in range(3)] != [ask(second) for _ in range(3)]


def test_reseeding_changes_what_comes_next() -> None:
    first, second = (new_study(sampler()) for _ in range(2))
    second.sampler.reseed_rng()
    assert [ask(first) for _ in range(3)] != [ask(second) for _ in range(3)]


def test_it_learns_and_covers_the_budgets() -> None:
    late = run(new_study(sampler()), 48)[24:]
    assert sum(point["method"] == "good" for point in late) > 18
    assert sum(abs(point["skip"] - 4) <= 1 for point in late) > 18
    assert len({int((point["budget"] - 0.2) / 0.7 * 5) for point in late}) == 5


def test_results_of_a_higher_rung_outweigh_those_below() -> None:
    """On rung 0 the bad method looks good; what was evaluated again on rung 1 knows better."""
    study, draws = new_study(sampler()), new_study(optuna.samplers.RandomSampler(0))
    points = [ask(draws) for _ in range(60)]
    for rung, (candidate, point) in product((0, 1), enumerate(points)):
        if rung == 0 or candidate < 40:
            value = quality(point) if rung else 50 + 20 * (point["method"] == "bad")
            attributes = {"rung": rung, "candidate": candidate}
            study.add_trial(create_trial(params=point, distributions=SPACE, values=[value, 1.0], user_attrs=attributes))
    chosen = [ask(study)["method"] for _ in range(7)]
    assert chosen.count("good") >= 5


def test_running_trials_are_not_proposed_again() -> None:
    """A space of twelve points, none of them twice while they run."""
    small = {"skip": IntDistribution(0, 5), "method": CategoricalDistribution(("good", "bad"))}
    study = optuna.create_study(direction="maximize", sampler=BudgetGPSampler(small, seed=0))
    for skip in (0, 2, 4, 5, 1):
        params = {"skip": skip, "method": "bad"}
        study.add_trial(create_trial(params=params, distributions=small, value=float(-abs(skip - 4))))
    asked = [tuple(study.ask(small).params.values()) for _ in range(2)]
    known = {(skip, "bad") for skip in (0, 2, 4, 5, 1)}
    assert len(set(asked) - known) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_count_as_worst_and_the_model_goes_on(value: float) -> None:
    results = new_study(sampler())
    study = new_study(sampler(results=results))

    def work(trials: int) -> list[dict[str, Any]]:
        points = []
        for _ in range(trials):
            trial = study.ask(SPACE)
            study.tell(trial, [0.0, 0.0])
            told = value if trial.params["method"] == "bad" else quality(dict(trial.params))
            state = TrialState.FAIL if math.isnan(told) else TrialState.COMPLETE
            results.add_trial(
                create_trial(
                    params=trial.params,
                    distributions=SPACE,
                    state=state,
                    values=None if math.isnan(told) else [told, 0.0],
                    user_attrs={"rung": 0},
                )
            )
            points.append(dict(trial.params))
        return points

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        late = work(40)[20:]
    assert [str(w.message) for w in said if "finite" in str(w.message)] == [
        "a quality is not a finite number: it counts as worse than all others"
    ]
    assert sum(point["method"] == "good" for point in late) >= 15
    assert sum(abs(point["skip"] - 4) <= 1 for point in late) >= 12


NUMBERS = count()


@pytest.mark.parametrize(
    "told",
    [
        lambda _: 50.0,
        lambda _: math.inf,
        lambda _: 50 + 1e-13 * next(NUMBERS),
        lambda _: 1e300 * (-1) ** next(NUMBERS),
        lambda point: 0.0 if point["skip"] else 1e-300,
    ],
    ids=["equal", "infinite", "tiny", "huge", "denormal"],
)
def test_results_that_say_nothing_neither_end_it_nor_make_it_repeat_itself(told: Callable[[Any], float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        points = run(new_study(sampler()), 30, told)
    assert len({tuple(point.values()) for point in points}) == 30
    assert len({(point["skip"], point["method"]) for point in points[10:]}) >= 4


def test_trials_of_another_space_are_left_out() -> None:
    study = new_study(sampler())
    wider = {**SPACE, "skip": IntDistribution(0, 50)}
    for skip in range(0, 50, 5):
        point = {"budget": 0.5, "skip": skip, "method": "good"}
        study.add_trial(create_trial(params=point, distributions=wider, values=[float(skip), 1.0]))
    study.add_trial(create_trial(params={}, distributions={}, values=[1.0, 1.0]))
    assert all(0 <= point["skip"] <= 5 for point in run(study, 10))


def test_several_unknown_objectives_are_weighted_anew_by_every_trial() -> None:
    """Both corners of the front are found: many skipped blocks are good for one objective, few for the other."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=BudgetGPSampler(seed=0))
    study.optimize(
        lambda t: (t.suggest_float("a", 0, 1), t.suggest_float("a", 0, 1) ** 2 + t.suggest_float("b", 0, 1)), 40
    )
    late = study.trials[15:]
    assert min(t.params["b"] for t in late) < 0.02
    assert sum(t.params["b"] < 0.3 for t in late) > 12
    assert max(t.params["a"] for t in late) - min(t.params["a"] for t in late) > 0.7


def test_what_it_has_read_is_what_is_there() -> None:
    """Trials end in another order than they began in, fail or are added; a new sampler proposes the same."""

    def values(point: dict[str, Any]) -> list[float]:
        return [quality(point), 100 * point["budget"]]

    lasting = sampler()
    study = new_study(lasting)
    run(study, 12)
    for number in range(6):
        first, second, third = (study.ask(SPACE) for _ in range(3))
        study.tell(third, values(third.params))
        study.tell(first, state=TrialState.FAIL)
        study.add_trial(create_trial(params=first.params, distributions=SPACE, values=values(first.params)))
        study.tell(second, values(second.params))
        trial = study._storage.get_trial(study._storage.create_new_trial(study._study_id))
        points = [own.sample_relative(study, trial, dict(SPACE)) for own in (lasting, sampler())]
        assert points[0] == points[1], number
        study.tell(trial.number, state=TrialState.FAIL)
    other = new_study(lasting)
    run(other, 4)
    assert [t.params for t in other.trials] == [t.params for t in _of_new(4).trials]


def _of_new(trials: int) -> optuna.Study:
    found = new_study(sampler())
    run(found, trials)
    return found


def test_a_proposal_is_computed_by_one_thread() -> None:
    """Where trials keep the processor busy, several threads wait for each other for seconds."""
    seen, before = list[int](), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        study = new_study(sampler(fit=lambda point: (seen.append(torch.get_num_threads()), point)[1]))
        run(study, 12)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
