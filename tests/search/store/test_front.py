from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymoo.indicators.hv import HV

from prunesweep.search.store.front import hypervolume, latest, pareto_front


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
