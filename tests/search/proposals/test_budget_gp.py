"""Proposals that fix a budget and learn the rest, on a made-up response."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial

from prunesweep.search.proposals import budget_gp
from prunesweep.search.proposals.budget_gp import CROWD, EXPLORE, GOLDEN, log_error, log_perplexity
from prunesweep.search.proposals.encoder import SearchSpaceEncoder
from prunesweep.search.proposals.evaluations import Evaluations, standardised
from prunesweep.search.store.run import Result

SPACE = {
    "budget": FloatDistribution(0.2, 0.9),
    "skip": IntDistribution(0, 5),
    "method": CategoricalDistribution(("good", "bad")),
}
SOURCE = 1000_000


def result(number: int, point: dict[str, Any], rung: int = 0) -> Result:
    """Skipping 4 blocks and the good method are right at every budget."""
    top1 = 80 + 10 * math.log(point["budget"]) - (point["skip"] - 4) ** 2 - 3 * (point["method"] == "bad")
    macs = int(point["budget"] * SOURCE)
    return Result(number, top1 + rung, 0.0, macs, 1, "", point, 0.0, rung=rung)


def known(space: dict[str, Any], results: list[Result]) -> Evaluations:
    encoder = SearchSpaceEncoder(space)
    texts = any(r.ppl is not None for r in results)
    quality = np.array([r.ppl if texts else r.top1 for r in results], float)
    return Evaluations.ordered(
        encoder.rows([r.point for r in results]),
        np.array([r.rung for r in results], int),
        np.array([r.trial for r in results], int),
        log_perplexity(quality) if texts else log_error(quality),
    )


def propose(space: dict[str, Any], results: list[Result], number: int, seed: int) -> dict[str, Any]:
    return budget_gp.propose(SearchSpaceEncoder(space), known(space, results), number, seed)


def search(count: int, seed: int) -> list[Result]:
    results: list[Result] = []
    for number in range(count):
        results.append(result(number, propose(SPACE, results, number, seed)))
    return results


def test_the_same_results_give_the_same_point() -> None:
    results = search(20, 0)
    assert propose(SPACE, results, 20, 0) == propose(SPACE, results, 20, 0)
    assert len({propose(SPACE, results, EXPLORE - 1, seed)["skip"] for seed in range(5)}) > 1  # a random one


def test_it_covers_the_window_and_finds_what_is_right_at_every_budget() -> None:
    late = [r.point for r in search(60, 1)[30:]]
    bands = Counter(int((p["budget"] - 0.2) / 0.7 * 5) for p in late)
    assert min(bands[band] for band in range(5)) >= 4
    assert np.mean([p["method"] == "good" for p in late]) > 0.8
    assert np.mean([abs(p["skip"] - 4) <= 1 for p in late]) > 0.8
    random = Random(0)
    chance = np.mean([abs(random.randint(0, 5) - 4) <= 1 for _ in range(1000)])
    assert chance < 0.6


def test_it_learns_from_the_highest_rung_that_has_enough() -> None:
    """Below, the bad method looks good; a higher rung knows better."""
    random = Random(0)
    points = [
        {"budget": random.uniform(0.2, 0.9), "skip": random.randint(0, 5), "method": random.choice(["good", "bad"])}
        for _ in range(90)
    ]
    trap = [
        Result(i, 50 + 20 * (p["method"] == "bad"), 0.0, int(p["budget"] * SOURCE), 1, "", p, 0.0)
        for i, p in enumerate(points)
    ]
    above = [result(i, p, rung=1) for i, p in enumerate(points[:40])]
    chosen = [propose(SPACE, [*trap, *above], n, 0)["method"] for n in range(0, 9) if n % EXPLORE != EXPLORE - 1]
    trapped = [propose(SPACE, trap, n, 0)["method"] for n in range(0, 9) if n % EXPLORE != EXPLORE - 1]
    assert chosen.count("good") > 0.7 * len(chosen)
    assert trapped.count("bad") > 0.7 * len(trapped)


def test_a_variable_that_is_alone_or_constant_is_proposed_all_the_same() -> None:
    """No budget among the variables; nothing but it; a range of one value."""
    spaces = [
        {"skip": SPACE["skip"], "method": SPACE["method"]},
        {"budget": SPACE["budget"]},
        {**SPACE, "keep": FloatDistribution(0.5, 0.5), "conv": IntDistribution(2, 2)},
    ]
    for space in spaces:
        full = {"budget": 0.5, "skip": 4, "method": "good", "keep": 0.5, "conv": 2}
        results = [result(i, full) for i in range(12)]  # all the same, too
        point = propose(space, results, 12, 0)
        assert set(point) == set(space)
        create_trial(params=point, distributions=space, value=0.0)  # raises where a value lies outside its range


def test_random_proposals_are_spread_over_the_budgets() -> None:
    for first in (0, 8, 40):
        budgets = sorted((EXPLORE * (first + i) - 1) * GOLDEN % 1 for i in range(1, 9))
        assert max(np.diff([0, *budgets, 1])) < 0.35


def test_random_points_do_nothing_along_most_of_the_variables_that_can() -> None:
    space = {"budget": FloatDistribution(0.2, 0.9), **{f"w{i}": FloatDistribution(0.5, 2, log=True) for i in range(8)}}
    encoder, none = SearchSpaceEncoder(space), known(space, [])
    idle = {f"w{i}": 1.0 for i in range(6)}
    points = [budget_gp.propose(encoder, none, number, 0, idle=idle) for number in range(50)]
    shares = [np.mean([point[name] == pytest.approx(1.0) for point in points]) for name in space]
    assert shares[0] == 0 == shares[7] == shares[8]
    assert all(0.5 < share < 0.95 for share in shares[1:7])
    assert len({point["budget"] for point in points}) == 50
    assert not any(point["w0"] == pytest.approx(1.0) for point in (propose(space, [], n, 0) for n in range(20)))


def test_a_mutation_leaves_idle_values_that_it_does_not_change() -> None:
    encoder = SearchSpaceEncoder({name: FloatDistribution(0.3, 1.0) for name in "abcdef"})
    rows = np.tile([1.0, 1.0, 1.0, 0.5, 0.5, 0.5], (200, 1))
    idle = np.array([1.0, 1.0, 1.0, np.nan, np.nan, np.nan])
    found = encoder.mutated(np.random.default_rng(0), rows, np.arange(6), idle)
    kept = (found == rows).mean(axis=0)
    assert (kept[:3] > 0.5).all()
    assert (kept[3:] == 0).all()
    assert {encoder.point(row)["a"] for row in found[found[:, 0] == 1]} == {1.0}


def test_a_search_with_variables_that_only_harm_leaves_them_idle() -> None:
    """Each of ten variables costs accuracy away from its idle value."""
    space = {"budget": FloatDistribution(0.2, 0.9), **{f"x{i}": IntDistribution(0, 5) for i in range(10)}}
    encoder, idle = SearchSpaceEncoder(space), {f"x{i}": 0 for i in range(10)}

    def found(idle: dict[str, int] | None) -> float:
        results: list[Result] = []
        for number in range(40):
            point = budget_gp.propose(encoder, known(space, results), number, 0, idle=idle)
            harm = sum(value for name, value in point.items() if name != "budget")
            results.append(Result(number, 95 - harm, 0.0, int(point["budget"] * SOURCE), 1, "", point, 0.0))
        return float(np.mean([r.top1 for r in results[20:]]))  # type: ignore[misc]

    assert found(idle) > found(None) + 2


def test_no_number_is_proposed_twice() -> None:
    """Budgets that are near to each other may decode to one architecture: what tells candidates apart is the rest."""
    space = {**SPACE, "lr": FloatDistribution(1e-5, 1e-2, log=True)}
    results = [result(i, {**r.point, "lr": 1e-2}) for i, r in enumerate(search(12, 3))]
    rates = [propose(space, results, number, 0)["lr"] for number in range(12, 18)]
    assert len({*rates, 1e-2}) == 7


def test_where_most_proposals_were_no_candidates_chance_takes_over() -> None:
    results = search(16, 4)

    def kinds(start: int) -> int:
        points = [propose(SPACE, results, number, 0) for number in range(start, start + 6)]
        return len({(p["skip"], p["method"]) for p in points})

    assert kinds(16) < kinds(4 * 16 + CROWD + 1)


def test_perplexity_takes_the_place_of_accuracy() -> None:
    results = search(20, 2)
    texts = [dataclasses.replace(r, top1=0.0, ppl=math.exp((100 - r.top1) / 10)) for r in results]
    by_ppl, by_top1 = (standardised(known(SPACE, each)).values for each in (texts, results))
    assert np.argsort(by_ppl).tolist() == np.argsort(by_top1).tolist()
    for number in range(21, 24):  # none of them is random
        assert propose(SPACE, texts, number, 0)["method"] == "good"


def test_every_rung_is_measured_by_its_own_median_and_spread() -> None:
    points = [{"budget": 0.2 + i / 60, "skip": i % 6, "method": "good"} for i in range(30)]
    below = [dataclasses.replace(result(i, p), top1=20 + i) for i, p in enumerate(points)]
    above = [dataclasses.replace(result(i, p, rung=1), top1=78 + i / 100) for i, p in enumerate(points[:10])]
    few = [dataclasses.replace(result(i, p, rung=2), top1=80.0) for i, p in enumerate(points[:4])]
    ruined = dataclasses.replace(below[0], trial=30, top1=0.1)
    found = standardised(known(SPACE, [*below, *above, *few, ruined]))
    assert set(found.rungs) == {0, 1}  # four results have no spread to speak of
    assert [abs(np.median(found.values[found.rungs == rung])) < 0.1 for rung in (0, 1)] == [True, True]
    # the few that were promoted are alike: what is left of their differences does not become large
    assert np.ptp(found.values[found.rungs == 1]) < 0.1 * np.ptp(found.values[found.rungs == 0])


def test_one_ruined_candidate_does_not_drown_the_others() -> None:
    same = [result(i, {"budget": 0.5, "skip": 4, "method": "good"}) for i in range(20)]
    near = [dataclasses.replace(r, top1=r.top1 + 0.1 * i) for i, r in enumerate(same)]
    values = standardised(known(SPACE, [*near, dataclasses.replace(same[0], trial=20, top1=0.0)])).values
    assert values.min() == -4
    assert np.ptp(values[:20]) > 2


def test_points_survive_encoding() -> None:
    space = {**SPACE, "lr": FloatDistribution(1e-5, 1e-2, log=True)}
    encoder, rng = SearchSpaceEncoder(space), np.random.default_rng(0)
    rows = encoder.mutated(rng, encoder.random(rng, 200), np.arange(1, 4))
    points = [encoder.point(row) for row in rows]
    assert encoder.rows(points) == pytest.approx(rows, abs=1e-9)
    assert {p["skip"] for p in points} == set(range(6))
    assert np.median([p["lr"] for p in points]) == pytest.approx(10**-3.5, rel=0.9)
    assert encoder.features(rows).shape == (200, 5)
    changed = (encoder.mutated(rng, rows, np.arange(1, 4)) != rows).mean(0)
    assert changed[0] == 0
    assert (changed[1:] > 0.2).all()
