"""Problems that samplers are measured on: what wrappers leave as it was, and what they change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sampler_quality import (
    RESULT,
    SEARCHES,
    Ladder,
    by_surface,
    problems,
    shares,
    simulate,
    summaries,
    table,
)
from benchmarks.surfaces import (
    Degenerate,
    DeitProblem,
    Discretised,
    FunctionProblem,
    Infeasible,
    Noisy,
    Permuted,
    Problem,
    RecordedProblem,
    Shifted,
)
from prunesweep.models import UserError
from prunesweep.search.proposals.budget_gp import log_nats

BASES: dict[str, Callable[[], Problem]] = {
    "deit": lru_cache(lambda: DeitProblem(500)),
    "function": lru_cache(lambda: FunctionProblem("ellipsoid", 500)),
}
WRAPPERS = [Shifted, Permuted, Noisy, Infeasible, Discretised, Degenerate]


def drawn(problem: Problem, count: int, seed: int = 0) -> list[Any]:
    """Points of a problem that can be built, drawn at random and placed."""
    found = []
    for row in problem.encoder.random(np.random.default_rng(seed), count):
        point = problem.placed(problem.encoder.point(row))
        try:
            problem.cost(point)
        except UserError:
            continue
        found.append(point)
    return found


def assert_beaten_by_none(problem: Problem, points: list[Any]) -> None:
    for point in points:
        cost = max(problem.cost(point), problem.distributions["budget"].low)  # type: ignore[attr-defined]
        dearer = problem.front[problem.front[:, 1] >= cost * 0.99]
        best = dearer if len(dearer) else problem.front  # what costs more than all of the front is worth less
        assert problem.value(point) <= best[:, 0].max() + 1e-6


@pytest.mark.parametrize("base", BASES)
def test_no_random_point_beats_the_front(base: str) -> None:
    assert_beaten_by_none(BASES[base](), drawn(BASES[base](), 200))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapper", [Shifted, Permuted])
def test_a_bijection_leaves_the_front_and_moves_all_else(wrapper: Any, base: str) -> None:
    inner = BASES[base]()
    outer = wrapper(inner, 3)
    assert outer.front == pytest.approx(inner.front, abs=1e-6)
    points = drawn(outer, 40)
    rows = outer.encoder.rows
    assert rows([outer.outward(outer.inward(p)) for p in points]) == pytest.approx(rows(points), abs=1e-9)
    moved = [p for p in points if outer.inward(p) != p]
    assert len(moved) > 30
    assert [p["budget"] for p in points] == [outer.inward(p)["budget"] for p in points]


def test_noise_is_what_is_measured_and_nothing_else() -> None:
    inner = BASES["function"]()
    outer, point = Noisy(inner, 0, share=0.2), drawn(inner, 1)[0]
    assert outer.value(point) == inner.value(point)
    assert outer.measured(point, 1, 5) == outer.measured(point, 1, 5)
    first, last = (np.std([outer.measured(point, rung, n) for n in range(200)]) for rung in (0, 1))
    assert first > 2 * last > 0.2 * float(np.ptp(inner.front[:, 0]))


@pytest.mark.parametrize("base", BASES)
def test_a_third_fails_and_nothing_of_the_front(base: str) -> None:
    problem = Infeasible(BASES[base](), 1)
    failed = [math.isnan(problem.measured(point, 0, n)) for n, point in enumerate(drawn(problem, 200, seed=1))]
    assert 0.1 < np.mean(failed) < 0.5
    assert not any(math.isnan(problem.measured(point, 1, n)) for n, point in enumerate(problem.best()))


@pytest.mark.parametrize("base", BASES)
def test_discretised_numbers_have_few_values(base: str) -> None:
    problem = Discretised(BASES[base](), 0, levels=4)
    inner = [problem.inward(point) for point in drawn(problem, 60)]
    coarse = [
        n for n, d in problem.problem.distributions.items() if n != "budget" and hasattr(d, "step") and not d.step
    ]
    assert coarse
    assert all(len({point[name] for point in inner}) <= 4 for name in coarse)
    assert [problem.outward(point) for point in inner[:10]] == drawn(problem, 60)[:10]


@pytest.mark.parametrize("base", BASES)
def test_most_of_a_degenerate_problem_is_at_chance(base: str) -> None:
    problem = Degenerate(BASES[base](), 0)
    found = [problem.measured(point, 0, n) for n, point in enumerate(drawn(problem, 200, seed=1))]
    known = [value for value in found if not math.isnan(value)]
    assert 0 < len(found) - len(known) < 30
    assert 0.5 < np.mean([value == min(known) for value in known]) < 0.9


def test_wrappers_compose() -> None:
    problem: Problem = BASES["function"]()
    for wrapper in WRAPPERS:
        problem = wrapper(problem, 4)
    found = simulate(problem, SEARCHES["random"](problem, 0))
    assert found.candidates > 40
    assert all(math.isfinite(value) for row in found.trained for value in row)


def test_records_are_answered_as_they_were_measured() -> None:
    """What is left out of the records is foretold, and no random point beats the best known front."""
    problem = RecordedProblem(0)
    held = problem.rows[::7]
    other = RecordedProblem(0)
    other.fit([row for i, row in enumerate(problem.rows) if i % 7])
    wanted = log_nats(np.array([row["kl"] for row in held]))
    got = other.untrained(problem.encoder.rows(problem.points(held)))
    assert 1 - np.var(got - wanted) / np.var(wanted) > 0.8
    assert_beaten_by_none(problem, drawn(problem, 40))
    for point in drawn(problem, 5):
        placed = problem.placed(point)
        assert placed == point
        assert problem.measured(point, 0, 1) == problem.measured(point, 0, 2)
        assert problem.measured(point, 1, 1) != problem.measured(point, 1, 2)


def test_every_sampler_has_the_same_first_points() -> None:
    problem = BASES["function"]()
    first = 2 * len(problem.distributions)

    class Silent:
        def propose(self, number: int, seen: Any, pending: Any) -> Any:
            raise AssertionError("nothing is known yet")

    one, other = Ladder(problem, Silent(), 0), SEARCHES["NSGA-II"](problem, 0)
    assert [one.ask() for _ in range(first)] == [other.ask() for _ in range(first)]


def test_ours_finds_more_than_chance() -> None:
    problem = BASES["function"]()
    (third, ours), (_, chance) = (
        shares(problem, simulate(problem, SEARCHES[name](problem, 0))) for name in ("budget_gp (ours)", "random")
    )
    assert 1 >= ours > chance + 0.1
    assert 0 <= third <= ours


def test_the_halves_share_no_surface() -> None:
    for name in ("deit, noisy", "sphere"):
        chosen, reported = (problems(half)[name]() for half in ("choose", "report"))
        points = drawn(chosen, 5)
        assert [chosen.value(p) for p in points] != [reported.value(p) for p in points]


def test_the_tables_of_the_documentation_are_those_of_the_result() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    text = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert summaries(found["rows"]) == {part: found[part] for part in ("all", "common")}
    for rows in (table(found, "all"), table(found, "common"), by_surface(found)):
        assert rows in text
