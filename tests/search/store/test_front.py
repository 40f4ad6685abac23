from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymoo.indicators.hv import HV

from prunesweep.search.store.front import Ranking, hypervolume, latest, pareto_front


@dataclass(frozen=True)
class P:
    top1: float
    macs: int


SOURCE = 100
points = st.lists(st.builds(P, st.integers(0, 20).map(lambda t: t * 5.0), st.integers(0, SOURCE)), max_size=30)


def beats(a: P, b: P) -> bool:
    return a.top1 >= b.top1 and a.macs <= b.macs and a != b


@given(points)
def test_front_is_what_nothing_beats(found: list[P]) -> None:
    front = pareto_front(found)
    assert set(front) == {p for p in found if not any(beats(q, p) for q in found)}
    assert len(set(front)) == len(front)
    assert front == sorted(front, key=lambda p: p.macs)


@given(points)
def test_hypervolume_agrees_with_pymoos(found: list[P]) -> None:
    if not found:
        assert hypervolume(found, {"macs": SOURCE}) == 0
        return
    losses = np.array([[-p.top1 / 100, p.macs / SOURCE] for p in found])
    inside = losses[(losses < [0.0, 1.0]).all(axis=1)]
    want = HV(ref_point=np.array([0.0, 1.0]))(inside) if len(inside) else 0.0
    assert hypervolume(found, {"macs": SOURCE}) == pytest.approx(want, abs=1e-12)


@given(points, st.builds(P, st.floats(0, 100), st.integers(0, SOURCE)))
def test_a_further_point_never_lowers_it(found: list[P], more: P) -> None:
    assert (
        0 <= hypervolume(found, {"macs": SOURCE}) <= hypervolume([*found, more], {"macs": SOURCE}) + 1e-12 <= 1 + 1e-9
    )


@dataclass(frozen=True)
class OnRung:
    trial: int
    rung: int


def test_a_candidate_is_its_result_on_the_highest_rung_in_any_order() -> None:
    first, second, other = OnRung(3, 0), OnRung(3, 1), OnRung(1, 0)
    assert latest([first, other, second]) == [second, other]
    assert latest([second, other, first]) == [second, other]


@dataclass(frozen=True)
class Measured:
    top1: float | None
    macs: int
    epochs: int = 1
    kl: float | None = None
    loss: float | None = None
    agreement: float | None = None


def test_trained_candidates_are_ranked_by_loss_and_untrained_ones_by_divergence() -> None:
    lucky = Measured(99.0, 100, loss=0.20, kl=0.30)
    better = Measured(98.0, 100, loss=0.05, kl=0.40)
    small = Measured(90.0, 50, loss=0.50, kl=0.90)
    found = [lucky, better, small]
    assert Ranking().front(found) == pareto_front(found) == [small, lucky]
    assert Ranking(rank_by="auto").front(found) == [small, better]
    assert Ranking(rank_by="kl").front(found) == [small, lucky]
    auto = Ranking(rank_by="auto")
    assert auto.values(lucky) == [0.20, 100]
    assert auto.values(replace(lucky, epochs=0)) == [0.30, 100]
    assert auto.directions == ["minimize", "minimize"]
    assert Ranking().directions == ["maximize", "minimize"]
    assert auto.goodness(better) > auto.goodness(lucky)
    assert Ranking().goodness(better) < Ranking().goodness(lucky)


def test_without_labels_all_candidates_are_ranked_by_divergence() -> None:
    ranking = Ranking(("macs", "agreement"), "auto")
    one, other = Measured(None, 100, kl=0.1, agreement=90.0), Measured(None, 100, kl=0.2, agreement=91.0)
    assert ranking.front([one, other]) == [one]
    assert ranking.values(one) == [100, 0.1]


def test_a_measure_that_is_missing_or_no_number_is_worst() -> None:
    ranking = Ranking(rank_by="loss")
    unknown, diverged = Measured(99.0, 10), Measured(math.nan, 10, loss=math.nan)
    assert ranking.front([unknown, diverged]) == []
    assert ranking.comparable(unknown) == ranking.comparable(diverged) == (math.inf, 10)
