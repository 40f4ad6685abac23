from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from prunesweep.search.store.pareto import as_losses, crowding_distance, fronts, hypervolume, non_dominated

losses = st.integers(1, 4).flatmap(
    lambda m: st.integers(0, 12).flatmap(lambda n: arrays(np.float64, (n, m), elements=st.integers(0, 6).map(float)))
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


@given(losses)
def test_non_dominated_is_what_nothing_dominates(points: np.ndarray) -> None:
    want = [not any(dominates(q, p) for q in points) for p in points]
    assert non_dominated(points).tolist() == want


@given(losses)
def test_fronts_part_the_points_and_each_is_dominated_by_the_one_before(points: np.ndarray) -> None:
    found = [front.tolist() for front in fronts(points)]
    assert sorted(i for front in found for i in front) == list(range(len(points)))
    for before, front in pairwise(found):
        assert all(any(dominates(points[j], points[i]) for j in before) for i in front)
    for front in found:
        assert not any(dominates(points[i], points[j]) for i in front for j in front)


def test_mixed_directions() -> None:
    values = [(80.0, 5), (81.0, 5), (79.0, 4), (79.0, 6)]
    assert non_dominated(as_losses(values, ["maximize", "minimize"])).tolist() == [False, True, True, False]
    assert as_losses([], ["maximize", "minimize"]).shape == (0, 2)


def test_crowding_distance_by_hand() -> None:
    """Deb et al. 2002: the ends are infinite, the others the sides of the box of their neighbours over the range."""
    points = np.array([[0, 10], [1, 6], [4, 4], [10, 0]], dtype=float)
    assert crowding_distance(points) == pytest.approx([np.inf, 0.4 + 0.6, 0.9 + 0.6, np.inf])
    flat = np.array([[1, 5], [2, 5], [3, 5]], dtype=float)
    assert crowding_distance(flat) == pytest.approx([np.inf, 1, np.inf])
    assert crowding_distance(np.empty((0, 2))).shape == (0,)


def test_hypervolume_by_hand() -> None:
    assert hypervolume(np.array([[1.0, 3.0], [2.0, 1.0], [3.0, 3.0]]), [4, 4]) == 3 * 1 + 2 * 2
    assert hypervolume(np.array([[0.0, 0, 0]]), [1, 2, 3]) == 6
    assert hypervolume(np.array([[0.0, 5.0]]), [1, 5]) == 0
    assert hypervolume(np.empty((0, 3)), [1, 1, 1]) == 0


@settings(deadline=None)
@given(losses)
def test_hypervolume_counts_cells(points: np.ndarray) -> None:
    """On a grid of integers it is the number of unit cells that some point dominates."""
    m = points.shape[1]
    cells = np.stack(np.meshgrid(*[np.arange(5)] * m, indexing="ij"), axis=-1).reshape(-1, m)
    covered = (points[None] <= cells[:, None]).all(axis=2).any(axis=1)
    assert hypervolume(points, [5] * m) == covered.sum()


@pytest.mark.parametrize("m", [2, 3, 4])
def test_it_agrees_with_pymoo(m: int) -> None:
    indicators = pytest.importorskip("pymoo.indicators.hv")
    sorting = pytest.importorskip("pymoo.util.nds.non_dominated_sorting")
    crowding = pytest.importorskip("pymoo.operators.survival.rank_and_crowding.metrics")
    points = np.random.default_rng(m).random((60, m))
    want = indicators.HV(ref_point=np.full(m, 0.9))(points)
    assert hypervolume(points, np.full(m, 0.9)) == pytest.approx(want, rel=1e-12)
    theirs = sorting.NonDominatedSorting().do(points)
    assert [sorted(front) for front in theirs] == [front.tolist() for front in fronts(points)]
    front = points[non_dominated(points)]
    # pymoo divides by the number of objectives
    assert crowding_distance(front) == pytest.approx(m * crowding.calc_crowding_distance(front), rel=1e-12)
