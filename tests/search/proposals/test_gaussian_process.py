"""What the model predicts of functions that are known."""

from __future__ import annotations

import numpy as np
import pytest

from prunesweep.search.proposals.gaussian_process import GaussianProcess, Observations, learn

RNG = np.random.default_rng(0)


def response(x: np.ndarray) -> np.ndarray:
    """Two variables matter, the third does not."""
    return 4 * (x[:, 0] - 0.7) ** 2 - np.sin(3 * x[:, 1])


def known(x: np.ndarray, rungs: np.ndarray, y: np.ndarray, candidates: np.ndarray | None = None) -> Observations:
    return Observations(x, range(x.shape[1]), rungs, np.arange(len(y)) if candidates is None else candidates, y)


def process(x: np.ndarray, rungs: np.ndarray, y: np.ndarray, candidates: np.ndarray | None = None) -> GaussianProcess:
    return GaussianProcess(known(x, rungs, y, candidates))


def test_it_predicts_what_it_was_not_shown() -> None:
    x, unseen = RNG.random((50, 3)), RNG.random((200, 3))
    y = response(x)
    mean, deviation = process(x, np.zeros(50, int), y + RNG.normal(0, 0.05, 50)).predict(unseen, 0)
    error = abs(mean - response(unseen))
    assert np.sqrt((error**2).mean()) < 0.2 * y.std()
    assert (error < 3 * deviation + 0.05).mean() > 0.95


def test_it_is_less_certain_where_it_knows_less() -> None:
    x = 0.5 * RNG.random((40, 2))
    _, deviation = process(x, np.zeros(40, int), response(x)).predict(np.array([[0.25, 0.25], [1.0, 1.0]]), 0)
    assert deviation[1] > 2 * deviation[0]


def test_a_cheap_rung_helps_the_one_above() -> None:
    """Ten results above say little by themselves; below there are 60, which are alike but for a drift."""
    x, unseen = RNG.random((60, 3)), RNG.random((200, 3))
    rungs, few = np.zeros(60, int), np.arange(10)
    below, above = response(x) + 0.3 * x[:, 1], response(x[few])
    both = process(
        np.vstack([x, x[few]]),
        np.append(rungs, rungs[few] + 1),
        np.append(below, above),
        candidates=np.append(np.arange(60), few),
    )
    alone = process(x[few], rungs[few] + 1, above)

    def error(model: GaussianProcess) -> float:
        return float(np.sqrt(((model.predict(unseen, 1)[0] - response(unseen)) ** 2).mean()))

    assert error(both) < 0.6 * error(alone)


def test_hyperparameters_from_some_results_serve_all() -> None:
    x, unseen = RNG.random((80, 3)), RNG.random((100, 3))
    y = response(x)
    learned = learn(known(x[:40], np.zeros(40, int), y[:40]), rungs=1)
    some = GaussianProcess(known(x, np.zeros(80, int), y), learned).predict(unseen, 0)[0]
    assert np.corrcoef(some, response(unseen))[0, 1] > 0.98


@pytest.mark.parametrize("values", [np.zeros(12), np.tile([1.0, -1.0], 6), np.full(12, 1e3)])
def test_what_has_nothing_to_learn_from_is_predicted_all_the_same(values: np.ndarray) -> None:
    """Every result at one point; no spread, contradictions, or an absurd scale."""
    x = np.full((12, 2), 0.5)
    mean, deviation = process(x, np.zeros(12, int), values).predict(RNG.random((5, 2)), 0)
    assert np.isfinite(mean).all()
    assert (deviation > 0).all()
