"""The search's state machine in simulated time: no processes, no Ray, and drivers that die at any moment."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from models.files import write_text
from search.coordinator import Coordinator, SearchFailed
from search.front import pareto_front
from search.run import Result, Run, Unit
from search.study import Study
from tests.search.helpers import make_run, make_space
from tests.search.test_study import trials

SPACE = make_space()


def start(run: Run, requested: int = 12, slots: int = 3, seed: int = 0, space: Any = SPACE) -> Coordinator:
    study = Study(run / "study.journal", space.distributions, seed)
    return Coordinator(run, study, space, requested=requested, slots=slots, seed=seed)


def work(run: Run, unit: Unit) -> Result:
    """What an actor would do: a made-up accuracy, a model's folder, a result."""
    candidate = SPACE.decode(unit.point)
    assert candidate.arch.hash == unit.arch_hash
    result = Result(
        trial=unit.number,
        top1=90 * unit.point["budget"] ** 0.3 - unit.point["skip"],
        zero_shot=10.0,
        macs=candidate.cost.macs,
        params=candidate.cost.params,
        arch_hash=unit.arch_hash,
        point=unit.point,
        seconds=1.0,
    )
    (run.trial(unit.id) / "model").mkdir(exist_ok=True)
    run.write_result(unit.id, result=result)
    return result


def test_it_runs_as_many_as_asked_for_and_no_more_at_once_than_slots(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    coordinator = start(run)
    live: list[Unit] = []
    while not coordinator.done:
        while (unit := coordinator.next()) is not None:
            assert json.loads((run.trial(unit.id) / "spec.json").read_text())["point"] == unit.point
            live.append(unit)
        assert len(live) <= 3
        assert coordinator.live == len(live)
        unit = live.pop(0)
        work(run, unit)
        coordinator.complete(unit.id)
    assert len(coordinator.results) == 12
    assert Counter(t.state.name for t in trials(run / "study.journal")) == {"COMPLETE": 12}
    assert run.status()["trials"] == {"finished": 12, "running": 0, "pending": 0, "failed": 0}


@pytest.mark.parametrize("seed", range(12))
def test_dying_at_any_moment_loses_nothing_and_repeats_nothing(seed: int, tmp_path: Path) -> None:
    run, random = make_run(tmp_path / "r"), Random(seed)
    done: Counter[str] = Counter()
    deaths = 0
    while True:
        coordinator = start(run)
        live: list[Unit] = []
        while not coordinator.done and not (deaths < 6 and random.random() < 0.12):
            unit = coordinator.next() if random.random() < 0.6 else None
            if unit is not None:
                live.append(unit)
            elif live:
                unit = live.pop(random.randrange(len(live)))
                work(run, unit)
                done[unit.id] += 1
                if deaths < 6 and random.random() < 0.2:
                    break  # dies with the result written and the study not told
                coordinator.complete(unit.id)
        if coordinator.done:
            break
        if random.random() < 0.3:
            coordinator._study._study.ask()  # dies while asking
        deaths += 1
    assert deaths
    assert set(done.values()) == {1}
    assert len(done) == 12
    told = {t.number: t.values for t in trials(run / "study.journal") if t.state.name == "COMPLETE"}
    assert told == {r.trial: [r.top1, float(r.macs)] for r in run.results()}
    assert len(told) == 12
    assert not any(t.state.name == "RUNNING" for t in trials(run / "study.journal"))


def test_what_was_begun_comes_first_with_its_own_number_point_and_seed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    coordinator = start(run)
    begun = [coordinator.next(), coordinator.next()]
    again = start(run)
    assert [again.next(), again.next()] == begun
    third = again.next()
    assert third is not None
    assert third.number == 2


def test_same_seed_same_proposals_with_one_slot(tmp_path: Path) -> None:
    points = []
    for name in "ab":
        run = make_run(tmp_path / name)
        coordinator = start(run, slots=1, seed=7)
        while (unit := coordinator.next()) is not None:
            work(run, unit)
            coordinator.complete(unit.id)
        points.append([(r.point, r.top1) for r in run.results()])
    assert points[0] == points[1]


def test_front_file_and_models_follow_the_results(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    coordinator = start(run)
    while (unit := coordinator.next()) is not None:
        work(run, unit)
        coordinator.complete(unit.id)
        front = json.loads((run / "front.json").read_text())
        want = pareto_front(run.results())
        assert [p["trial"] for p in front] == [r.trial for r in want]
        kept = {p.parent.name for p in (run / "trials").glob("*/model")}
        assert kept == {f"r0-{r.trial:04d}" for r in want}
        assert all((run.path / p["model"]).is_dir() for p in front)


def test_a_model_that_is_not_told_yet_is_not_deleted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    coordinator = start(run)
    first, second = coordinator.next(), coordinator.next()
    assert first is not None
    assert second is not None
    work(run, first)
    work(run, second)
    coordinator.complete(first.id)
    assert (run.trial(second.id) / "model").is_dir()


def test_stopping_keeps_what_is_running_for_later(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    coordinator = start(run)
    units = [coordinator.next(), coordinator.next()]
    coordinator.stop()
    assert run.stop_file.exists()
    assert coordinator.next() is None
    assert not coordinator.done
    assert units[0] is not None
    assert units[1] is not None
    work(run, units[0])
    coordinator.complete(units[0].id)
    coordinator.complete(units[1].id)  # it stopped without a result
    assert coordinator.done
    assert not coordinator.finished
    again = start(run)
    assert len(again.results) == 1
    assert again.next() == units[1]


def test_failures_are_counted_and_too_many_end_the_search(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    coordinator = start(run)
    for i in range(4):
        unit = coordinator.next()
        assert unit is not None
        if i < 3:
            coordinator.complete(unit.id, error=f"lost {i}")
    assert len(coordinator.failures) == 3
    assert run.status()["trials"]["failed"] == 3
    with pytest.raises(SearchFailed, match=r"4 of 12 trials failed; the last one with:\nlost 3"):
        coordinator.complete(unit.id, error="lost 3")
    assert Counter(t.state.name for t in trials(run / "study.journal")) == {"FAIL": 4}
    assert len(start(run).failures) == 4


def test_a_failed_unit_is_not_run_again_and_counts_as_one_of_those_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    coordinator = start(run, slots=1)
    unit = coordinator.next()
    assert unit is not None
    run.write_result(unit.id, error="boom")
    again = start(run, slots=1)
    assert again.failures == {unit.id: "boom"}
    while (unit := again.next()) is not None:
        work(run, unit)
        again.complete(unit.id)
    assert len(again.results) == 11


def test_points_that_no_architecture_meets_are_taken_back(tmp_path: Path) -> None:
    coarse = make_space(groups={"embed": 0, "heads": 0, "qk": 0, "v": 0, "mlp": 8})
    run = make_run(tmp_path / "r")
    coordinator = start(run, space=coarse)
    for _ in range(3):
        unit = coordinator.next()
        assert unit is not None
        coarse.decode(unit.point)
    states = Counter(t.state.name for t in trials(run / "study.journal"))
    assert states["RUNNING"] == 3
    assert set(states) <= {"RUNNING", "PRUNED"}


def test_more_trials_can_be_asked_for_later(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    for requested in (3, 5):
        coordinator = start(run, requested=requested)
        while (unit := coordinator.next()) is not None:
            work(run, unit)
            coordinator.complete(unit.id)
        assert len(coordinator.results) == requested


def test_status_tells_running_from_pending_by_the_lease(tmp_path: Path) -> None:
    from search.run import Lease

    run = make_run(tmp_path / "r")
    coordinator = start(run)
    coordinator.next()
    assert run.status()["trials"] == {"finished": 0, "running": 0, "pending": 12, "failed": 0}
    with Lease(run.path):
        assert run.status()["trials"] == {"finished": 0, "running": 1, "pending": 11, "failed": 0}
    write_text(run / "front.json", "[]")
