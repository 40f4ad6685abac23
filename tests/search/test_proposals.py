"""Proposals that fix a budget and learn the rest, on a made-up response."""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search.proposals import EXPLORE, excess, propose
from search.run import Result

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


def search(count: int, seed: int) -> list[Result]:
    results: list[Result] = []
    for number in range(count):
        results.append(result(number, propose(SPACE, results, number, seed)))
    return results


def test_the_same_results_give_the_same_point() -> None:
    results = search(20, 0)
    assert propose(SPACE, results, 20, 0) == propose(SPACE, results, 20, 0)
    assert len({tuple(propose(SPACE, results, 20, seed).values()) for seed in range(5)}) > 1


def test_it_covers_the_window_and_finds_what_is_right_at_every_budget() -> None:
    late = [r.point for r in search(120, 1)[60:]]
    bands = Counter(int((p["budget"] - 0.2) / 0.7 * 5) for p in late)
    assert min(bands[band] for band in range(5)) >= 8
    assert np.mean([p["method"] == "good" for p in late]) > 0.7
    assert np.mean([abs(p["skip"] - 4) <= 1 for p in late]) > 0.7
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
    chosen = [propose(SPACE, [*trap, *above], n, 0)["method"] for n in range(0, 40) if n % EXPLORE != EXPLORE - 1]
    trapped = [propose(SPACE, trap, n, 0)["method"] for n in range(0, 40) if n % EXPLORE != EXPLORE - 1]
    assert chosen.count("good") > 0.7 * len(chosen)
    assert trapped.count("bad") > 0.7 * len(trapped)


def test_excess_is_what_lies_above_the_trend_of_costs() -> None:
    known = [result(i, {"budget": 0.2 + i / 60, "skip": 4, "method": "good"}) for i in range(40)]
    lucky = Result(40, known[20].top1 + 5, 0.0, known[20].macs, 1, "", known[20].point, 0.0)
    found = excess([*known, lucky], known[20].macs, 5)
    assert len(found) == 20
    assert max(found, key=found.__getitem__) == 40
    assert found[40] == pytest.approx(5, abs=1)
    assert set(found) > {18, 19, 20, 21, 22, 40}  # the nearest ones


def test_results_of_one_cost_have_no_trend() -> None:
    known = [result(i, {"budget": 0.5, "skip": i % 6, "method": "good"}) for i in range(12)]
    found = excess(known, SOURCE / 2, 12)
    assert max(found, key=found.__getitem__) % 6 == 4
