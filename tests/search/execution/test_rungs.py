"""A scheduler in simulated time: workers that end in any order, drivers that are rebuilt at any moment."""

from __future__ import annotations

import heapq
import itertools
import math
import warnings
from collections import Counter
from random import Random

import pytest

from prunesweep.search.execution.rungs import MultiObjectiveASHA

BOTH = ("maximize", "minimize")


def accuracy(candidate: int, rung: int) -> float:
    """Better with every rung; ranks change between rungs."""
    random = Random(candidate)
    return 60 * random.random() + 10 * rung + 5 * Random(candidate * 10 + rung).random()


def macs(candidate: int) -> int:
    return Random(f"macs {candidate}").randint(100, 900)


def run(
    candidates: int, workers: int, seed: int, *, rungs: int = 3, reduction_factor: float = 3, rebuild: bool = False
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Units as they were handed out, and as they ended; ``rebuild`` asks a new driver every time."""
    random, clock, now = Random(seed), itertools.count(), 0.0
    handed: list[tuple[int, int]] = []
    ended: list[tuple[int, int]] = []
    queue: list[tuple[float, int, tuple[int, int]]] = []
    live = MultiObjectiveASHA(rungs, reduction_factor, BOTH, bands=(300, 600))
    started = 0
    while True:
        while len(queue) < workers:
            promotions = live
            if rebuild:
                promotions = MultiObjectiveASHA(rungs, reduction_factor, BOTH, bands=(300, 600))
                for rung, number in random.sample(handed, len(handed)):
                    if rung:
                        promotions.promoted(rung, number)
                for rung, number in random.sample(ended, len(ended)):
                    promotions.add(rung, number, (accuracy(number, rung), macs(number)))
            unit = promotions.next()
            assert unit == live.next()
            if unit is not None:
                live.promoted(*unit)
            elif started < candidates:
                unit, started = (0, started), started + 1
            else:
                break
            handed.append(unit)
            heapq.heappush(queue, (now + (unit[0] + 1) * random.expovariate(1), next(clock), unit))
        if not queue:
            return handed, ended
        now, _, unit = heapq.heappop(queue)
        ended.append(unit)
        live.add(unit[0], unit[1], (accuracy(unit[1], unit[0]), macs(unit[1])))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("workers", [1, 4, 30])
def test_a_third_goes_on_whatever_the_order_of_arrival(workers: int, seed: int) -> None:
    handed, _ = run(90, workers, seed)
    assert Counter(rung for rung, _ in handed) == {0: 90, 1: 30, 2: 10}
    assert len(set(handed)) == len(handed)
    for rung, number in handed:
        assert not rung or handed.index((rung - 1, number)) < handed.index((rung, number))


@pytest.mark.parametrize("seed", range(5))
def test_a_driver_rebuilt_from_the_results_decides_the_same(seed: int) -> None:
    _, ended = run(60, 4, seed, rebuild=True)
    assert Counter(rung for rung, _ in ended) == {0: 60, 1: 20, 2: 6}


def test_at_most_the_share_is_promoted_at_any_moment() -> None:
    """Fronts move as results arrive; those that were promoted before count."""
    promotions, count = MultiObjectiveASHA(2, 3, BOTH), 0
    for number in range(90):
        promotions.add(0, number, (float(number), number))  # all of them are on the front, always
        while (unit := promotions.next()) is not None:
            promotions.promoted(*unit)
            count += 1
        assert count == (number + 1) // 3


def filled(values: list[tuple[float, ...]], **options: object) -> MultiObjectiveASHA:
    settings: dict[str, object] = {"directions": BOTH, "reduction_factor": 3, **options}
    promotions = MultiObjectiveASHA(2, **settings)  # type: ignore[arg-type]
    for number, each in enumerate(values):
        promotions.add(0, number, each)
    return promotions


def order(promotions: MultiObjectiveASHA) -> list[int]:
    found = []
    while (unit := promotions.next()) is not None:
        promotions.promoted(*unit)
        found.append(unit[1])
    return found


def test_a_better_front_goes_first() -> None:
    # 0 and 3 are on the front; 2 is behind 3 alone, 1 behind all
    values = [(50.0, 100), (40.0, 400), (60.0, 300), (70.0, 200)]
    assert order(filled(values, reduction_factor=1.01)) == [0, 3, 2]


@pytest.mark.parametrize("directions", [("maximize", "minimize"), ("minimize", "minimize"), ("maximize", "maximize")])
def test_every_objective_has_its_own_direction(directions: tuple[str, str]) -> None:
    best = (70.0 if directions[0] == "maximize" else 10.0, 900 if directions[1] == "maximize" else 100)
    values = [(40.0, 500), (50.0, 400), best]
    assert filled(values, directions=directions).next() == (1, 2)


def test_three_objectives() -> None:
    values = [(70.0, 500, 3.0), (70.0, 500, 4.0), (60.0, 600, 5.0)]
    assert filled(values, directions=(*BOTH, "minimize")).next() == (1, 0)


def test_bands_take_turns_within_a_front() -> None:
    """Six points of one front, four of them in the cheapest third: each band is served before one is served twice."""
    values = [(float(m), m) for m in (100, 110, 130, 160, 500, 800)]
    first = order(filled(values, reduction_factor=2, bands=(300, 600)))
    assert {0 if m < 300 else 1 if m < 600 else 2 for m in (values[i][1] for i in first)} == {0, 1, 2}
    # a value on a boundary belongs above it
    assert order(filled([(1.0, 100), (2.0, 299), (3.0, 300)], reduction_factor=1.5, bands=(300,))) == [0, 2]


def test_isolated_points_of_a_front_go_first_and_ties_by_number() -> None:
    values = [(10.0, 10), (11.0, 11), (12.0, 12), (50.0, 50), (90.0, 90)]
    assert order(filled(values, reduction_factor=1.25)) == [0, 4, 3, 2]
    assert order(filled([(5.0, 5)] * 6, reduction_factor=2)) == [0, 1, 2]


def test_the_highest_rung_goes_first() -> None:
    promotions = MultiObjectiveASHA(3, 2, BOTH)
    for number in range(4):
        promotions.add(0, number, (float(number), number))
    for number in (0, 3):
        promotions.promoted(1, number)
        promotions.add(1, number, (float(number), number))
    promotions.add(0, 4, (9.0, 1))
    promotions.add(0, 5, (9.5, 1))
    assert promotions.next() == (2, 0)
    promotions.promoted(2, 0)
    assert promotions.next() == (1, 5)


def test_one_that_failed_above_keeps_its_place_in_the_count() -> None:
    promotions = filled([(1.0, 1), (2.0, 2), (3.0, 3)])
    assert order(promotions) == [0]
    assert promotions.next() is None  # its unit fails: nothing is added on rung 1, nobody takes its place


def test_one_rung_promotes_nobody() -> None:
    promotions = MultiObjectiveASHA(1, 3, BOTH)
    for number in range(9):
        promotions.add(0, number, (1.0, number))
    assert promotions.next() is None


def test_what_makes_no_sense_is_refused() -> None:
    for settings in ({"rungs": 0, "reduction_factor": 3}, {"rungs": 2, "reduction_factor": 1}):
        with pytest.raises(ValueError, match="at least one rung"):
            MultiObjectiveASHA(directions=BOTH, **settings)
    with pytest.raises(ValueError, match="must ascend"):
        MultiObjectiveASHA(2, 3, BOTH, bands=(2, 1))
    with pytest.raises(ValueError, match="minimised"):
        MultiObjectiveASHA(2, 3, ("maximize",), bands=(1,))
    promotions = MultiObjectiveASHA(2, 3, BOTH)
    for values in ((1.0,), (float("nan"), 1)):
        with pytest.raises(ValueError, match="must be 2 numbers"):
            promotions.add(0, 0, values)
    for rung in (0, 2):
        with pytest.raises(ValueError, match=r"rungs 1\.\.1"):
            promotions.promoted(rung, 0)


def test_results_that_are_infinitely_bad_are_promoted_last() -> None:
    values = [(-math.inf, 10), (50.0, 100), (60.0, 200), (-math.inf, 5), (70.0, 300)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = order(filled(values, reduction_factor=1.2))
    assert found[-1] in (0, 3)
    assert set(order(filled([(-math.inf, math.inf)] * 4, reduction_factor=2))) == {0, 1}


def test_what_enough_others_dominate_can_never_be_promoted() -> None:
    """Three results of six there can be, two places: beaten by both others is out, whatever comes; by one is not."""
    asha = MultiObjectiveASHA(2, 3, ["maximize", "minimize"])
    for candidate, values in enumerate([(80, 1), (70, 2), (60, 3)]):
        asha.add(0, candidate, values)
    assert asha.hopeless(1, 6) == {2}
    assert asha.hopeless(1, 9) == set()
    asha.add(0, 3, (math.inf * -1, math.inf))  # no number
    assert asha.hopeless(1, 9) == {3}
    asha.promoted(1, 0)
    assert asha.hopeless(1, 6) == {2, 3}
    asha.promoted(1, 1)
    assert asha.hopeless(1, 6) == {2, 3}
    assert asha.hopeless(1, 9) == {3}


@pytest.mark.parametrize("seed", range(20))
def test_no_one_is_promoted_that_was_hopeless(seed: int) -> None:
    random, asha, out, seen = Random(seed), MultiObjectiveASHA(3, 2, ["maximize", "minimize"], bands=[0.5]), set(), 0
    for candidate in range(40):
        asha.add(0, candidate, (random.random() if random.random() < 0.9 else -math.inf, random.random()))
        while (due := asha.next()) is not None and random.random() < 0.7:
            rung, number = due
            assert (rung, number) not in out
            asha.promoted(rung, number)
            if rung == 1:
                asha.add(1, number, (random.random(), random.random()))
        now = {(1, n) for n in asha.hopeless(1, 40)} | {(2, n) for n in asha.hopeless(2, 20)}
        assert out <= now
        out, seen = now, seen + len(now)
    assert seen
