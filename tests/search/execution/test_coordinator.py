"""The search's state machine in simulated time: no processes, no Ray, and drivers that die at any moment."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from prunesweep.models.io.store import saved_digest
from prunesweep.pruners import GROUP_SIZES
from prunesweep.search.config import SearchTable
from prunesweep.search.execution.coordinator import Coordinator, SearchFailed
from prunesweep.search.store.front import hypervolume, latest, pareto_front
from prunesweep.search.store.run import Result, Run, Task, task_id
from prunesweep.search.store.study import RESULTS, Study
from tests.search.helpers import make_run, make_space, put_model
from tests.search.store.test_study import die_while_asking, load, trials

SPACE = make_space()


def start(
    run: Run, requested: int = 12, max_concurrent: int = 3, seed: int = 0, space: Any = SPACE, **search: Any
) -> Coordinator:
    study = Study(run / "study.journal", space.distributions, seed, rank_by=search.get("rank_by", "objective"))
    return Coordinator(
        run, study, space, SearchTable(trials=requested, **search), max_concurrent=max_concurrent, seed=seed
    )


def work(run: Run, unit: Task, space: Any = SPACE) -> Result:
    """What an actor would do: a made-up accuracy, a model's folder, a result."""
    candidate = space.decode(unit.point)
    assert candidate.arch.hash == unit.arch_hash
    assert candidate.key == unit.key
    put_model(run.trial(unit.id) / "model")
    result = Result(
        trial=unit.number,
        rung=unit.rung,
        key=unit.key,
        top1=90 * unit.point["budget"] ** 0.3 - unit.point["skip"] + unit.rung,
        zero_shot=10.0,
        macs=candidate.cost.macs,
        params=candidate.cost.params,
        arch_hash=unit.arch_hash,
        point=unit.point,
        seconds=1.0,
        epochs=1,
        loss=1 + unit.point["skip"],  # not what its top-1 says
        weights=saved_digest(run.trial(unit.id) / "model"),
    )
    run.write_result(unit.id, result=result)
    return result


def test_it_runs_as_many_as_asked_for_and_no_more_at_once_than_fit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    coordinator = start(run)
    live: list[Task] = []
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


@pytest.mark.parametrize(("scale", "small"), [("linear", 1), ("log", 2)])
def test_promotions_are_spread_over_the_window_on_its_scale(scale: str, small: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    space = make_space(budget=(0.1, 0.9), budget_scale=scale, skip=(0, 0), groups=dict.fromkeys(GROUP_SIZES, 1))
    coordinator = start(run, 20, 20, space=space, rungs=(1, 3), reduction_factor=2)
    for unit in [coordinator.next() for _ in range(20)]:
        assert unit is not None
        work(run, unit, space)
        coordinator.complete(unit.id)
    promoted = [coordinator.next() for _ in range(5)]
    assert [unit.rung for unit in promoted if unit is not None] == [1] * 5
    assert sum(unit.point["budget"] < 0.24 for unit in promoted if unit is not None) == small


@pytest.mark.parametrize("seed", range(12))
def test_dying_at_any_moment_loses_nothing_and_repeats_nothing(seed: int, tmp_path: Path) -> None:
    run, random = make_run(tmp_path / "r"), Random(seed)
    done: Counter[str] = Counter()
    deaths = 0
    while True:
        coordinator = start(run)
        live: list[Task] = []
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
            die_while_asking(run / "study.journal")
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
        coordinator = start(run, max_concurrent=1, seed=7)
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
    coordinator = start(run, max_concurrent=1)
    unit = coordinator.next()
    assert unit is not None
    run.write_result(unit.id, error="boom")
    again = start(run, max_concurrent=1)
    assert again.failures == {unit.id: "boom"}
    while (unit := again.next()) is not None:
        work(run, unit)
        again.complete(unit.id)
    assert len(again.results) == 11


def test_failed_units_are_done_again_where_that_is_wanted(tmp_path: Path) -> None:
    """With their own numbers, points and seeds, on any rung; Optuna's study learns what they gave in the end."""
    run = make_run(tmp_path / "r", 9, **LADDER)
    coordinator = start(run, 9, max_concurrent=1, **LADDER)
    failed: dict[str, Task] = {}
    while (unit := coordinator.next()) is not None:
        if unit.number == 1 or unit.rung == 1:
            failed[unit.id] = unit
            coordinator.complete(unit.id, error="boom")
        else:
            work(run, unit)
            coordinator.complete(unit.id)
        if len(failed) == 2:
            break
    assert run.failures() == dict.fromkeys(failed, "boom")
    assert start(run, 9, max_concurrent=1, **LADDER).failures == coordinator.failures
    run.forget_failures()
    again = start(run, 9, max_concurrent=1, **LADDER)
    assert again.failures == {}
    assert not again.notes
    while (unit := again.next()) is not None:
        if unit.id in failed:
            assert unit == failed.pop(unit.id)
        work(run, unit)
        again.complete(unit.id)
    assert failed == {}
    assert run.status()["rungs"] == [9, 3, 1]
    told = [t.values for t in trials(run / "study.journal") if t.state.name == "COMPLETE"]
    assert sorted(told) == sorted([r.top1, float(r.macs)] for r in run.results() if r.rung == 0)
    assert len(list(run.path.glob("trials/*/result.json.failed-1"))) == 2
    assert not start(run, 9, **LADDER).notes


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
    run = make_run(tmp_path / "r")
    coordinator = start(run)
    unit = coordinator.next()
    assert unit is not None
    assert run.status()["trials"] == {"finished": 0, "running": 0, "pending": 12, "failed": 0}
    with run.lock():
        assert run.status()["tasks"][0]["waiting"] == 1
        run.begins(unit.id)
        assert run.status()["trials"] == {"finished": 0, "running": 1, "pending": 11, "failed": 0}
        again = start(run)  # of another driver, which has not handed it out yet
        assert run.status()["tasks"][0]["waiting"] == 1
        assert again.next() == unit
        run.begins(unit.id)
        again.complete(unit.id)  # stopped: it is handed out again, later
        assert run.status()["tasks"][0]["waiting"] == 1
    assert run.status()["trials"] == {"finished": 0, "running": 0, "pending": 12, "failed": 0}


LADDER: dict[str, Any] = {"rungs": (0, 1, 2), "reduction_factor": 3}


def climb(coordinator: Coordinator, run: Run, random: Random, chance: float = 0.0) -> Counter[str]:
    """Work in any order until all is done, or with some chance die at any moment."""
    done: Counter[str] = Counter()
    live: list[Task] = []
    while not coordinator.done:
        if random.random() < chance:
            return done
        unit = coordinator.next() if random.random() < 0.6 else None
        if unit is not None:
            live.append(unit)
        elif live:
            unit = live.pop(random.randrange(len(live)))
            work(run, unit)
            done[unit.id] += 1
            if random.random() < chance:
                return done
            coordinator.complete(unit.id)
    return done


@pytest.mark.parametrize("seed", range(8))
def test_a_ladder_promotes_its_share_and_survives_deaths(seed: int, tmp_path: Path) -> None:
    run, random = make_run(tmp_path / "r", 27, **LADDER), Random(seed)
    done: Counter[str] = Counter()
    for death in range(20):
        coordinator = start(run, 27, **LADDER)
        done += climb(coordinator, run, random, 0.05 if death < 8 else 0.0)
        if coordinator.finished:
            break
    assert set(done.values()) == {1}
    assert Counter(name[:2] for name in done) == {"r0": 27, "r1": 9, "r2": 3}
    assert run.status()["rungs"] == [27, 9, 3]
    # every promoted candidate is the one from the rung below, with a seed of its own
    by_place = {(r.trial, r.rung): r for r in run.results()}
    for (trial, rung), result in by_place.items():
        if rung:
            assert result.key == by_place[trial, rung - 1].key
            assert result.point == by_place[trial, rung - 1].point
    # once all is done the front's models are left, and others that only a promotion could still beat
    kept = {p.parent.name for p in run.path.glob("trials/*/model")}
    assert kept >= {f"r{p['rung']}-{p['trial']:04d}" for p in json.loads((run / "front.json").read_text())}
    final = [r for r in run.results() if r.rung == 2]
    current = latest(run.results())
    assert kept == {r.id for r in current if r in pareto_front([*final, r])}
    assert Counter(t.state.name for t in trials(run / "study.journal"))["COMPLETE"] >= 27
    # the journal's results are all there, once, and their best trials are the front
    units = Counter(t.user_attrs["unit"] for t in trials(run / "study.journal", RESULTS))
    assert units == Counter(r.id for r in run.results())
    best = load(run / "study.journal", RESULTS).best_trials
    places = {(t.user_attrs["candidate"], t.user_attrs["rung"], *t.values) for t in best}
    assert places == {(p["trial"], p["rung"], p["top1"], p["macs"]) for p in run.front()}


def test_training_on_that_makes_a_candidate_worse_counts(tmp_path: Path) -> None:
    """The front follows every candidate's last measurement, and what a replaced one had beaten is there again."""
    run = make_run(tmp_path / "r", 9, rungs=(1, 2), reduction_factor=3)
    coordinator = start(run, 9, max_concurrent=1, rungs=(1, 2), reduction_factor=3)
    while (unit := coordinator.next()) is not None:
        result = work(run, unit)
        if unit.rung:
            run.write_result(unit.id, result=replace(result, top1=1.0))
        coordinator.complete(unit.id)
        known = coordinator.results
        assert coordinator.front == run.front(known) == run.front()
        want = pareto_front([r for r in known if not any(r.trial == s.trial and r.rung < s.rung for s in known)])
        assert [(p["trial"], p["rung"]) for p in coordinator.front] == [(r.trial, r.rung) for r in want]
        assert all((run.path / p["model"]).is_dir() for p in coordinator.front)
    promoted = {r.trial for r in coordinator.results if r.rung == 1}
    assert len(promoted) == 3
    assert not promoted & {p["trial"] for p in coordinator.front if p["top1"] > 1}
    assert run.status()["hypervolume"] == hypervolume(latest(run.results()), run.metadata()["source"])
    again = start(run, 9, max_concurrent=1, rungs=(1, 2), reduction_factor=3)
    assert again.front == coordinator.front


def kept_models(run: Run) -> set[str]:
    return {path.parent.name for path in run.path.glob("trials/*/model")}


@pytest.mark.parametrize("seed", range(3))
def test_models_stay_while_a_promotion_may_start_from_them(seed: int, tmp_path: Path) -> None:
    """Others go before the end, and the front is what it is where all models stay."""
    ladder: dict[str, Any] = {"rungs": (1, 2, 4), "reduction_factor": 2}
    found = {}
    for keep in ("front", "all"):
        run, random = make_run(tmp_path / keep, 20, **ladder), Random(seed)
        coordinator = start(run, 20, seed=seed, keep_models=keep, **ladder)
        live, gone = list[Task](), set[str]()  # before the end, of candidates that were not promoted
        while not coordinator.done:
            if random.random() < 0.6 and (unit := coordinator.next()) is not None:
                live.append(unit)
                assert not unit.rung or task_id(unit.number, unit.rung - 1) in kept_models(run)
            elif live:
                unit = live.pop(random.randrange(len(live)))
                result = work(run, unit)
                run.write_result(unit.id, result=replace(result, top1=Random(f"{seed} {unit.id}").uniform(20, 80)))
                coordinator.complete(unit.id)
                if not coordinator.done:
                    gone |= {r.id for r in coordinator.current if r.rung < 2} - kept_models(run)
                members = {task_id(point["trial"], point["rung"]) for point in run.front()}
                assert members == {task_id(p["trial"], p["rung"]) for p in run.front(coordinator.results)}
                assert members <= kept_models(run)
        found[keep] = (run.front(), {r.id for r in run.results()}, kept_models(run), gone)
    assert found["front"][:2] == found["all"][:2]
    assert found["all"][2] == found["all"][1]  # every model is there
    assert found["front"][3]
    assert not found["all"][3]


def test_the_same_candidate_is_not_evaluated_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A space of three architectures: the search ends when it has them all, and the study knows what they gave."""
    monkeypatch.setattr("prunesweep.search.execution.coordinator.MAX_REJECTED", 150)  # which takes a while otherwise
    coarse = make_space(
        budget=(0.35, 0.9), skip=(0, 0), lr=(1e-3, 1e-3), groups={**dict.fromkeys(GROUP_SIZES, 0), "embed": 4}
    )
    run = make_run(tmp_path / "r")
    coordinator = start(run, space=coarse)
    keys = []
    while (unit := coordinator.next()) is not None:
        keys.append(unit.key)
        candidate = coarse.decode(unit.point)
        run.write_result(
            unit.id,
            result=Result(
                trial=unit.number,
                key=unit.key,
                top1=50.0,
                zero_shot=0.0,
                macs=candidate.cost.macs,
                params=candidate.cost.params,
                arch_hash=unit.arch_hash,
                point=unit.point,
                seconds=0.0,
            ),
        )
        put_model(run.trial(unit.id) / "model")
        coordinator.complete(unit.id)
    assert coordinator.finished
    assert len(keys) == len(set(keys)) < 12
    assert coordinator.duplicates > 0
    told = [t for t in trials(run / "study.journal") if t.state.name == "COMPLETE"]
    assert len(told) == len(keys) + coordinator.duplicates
    again = start(run, space=coarse)
    assert again.next() is None  # a driver that goes on knows them all, too
    assert again.duplicates > 0


def test_one_architecture_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other axes save more than many budgets ask for, and decisions may differ in their groups of tokens only."""
    monkeypatch.setattr("prunesweep.search.execution.coordinator.MAX_REJECTED", 150)  # which takes a while otherwise
    table = {"skip": (2, 3), "keep_rate": (0.4, 0.6), "budget": (0.5, 0.9), "lr": (1e-3, 1e-3)}
    space = make_space(**table, groups={**dict.fromkeys(GROUP_SIZES, 0), "embed": 4})
    decode = space.decode
    monkeypatch.setattr(space, "decode", lambda point: replace(decode(point), key=f"decision of {point}"))
    run = make_run(tmp_path / "r")
    coordinator = start(run, space=space)
    found = []
    for _ in range(2):
        while (unit := coordinator.next()) is not None:
            candidate = space.decode(unit.point)
            found.append(unit.arch_hash)
            result = Result(
                trial=unit.number,
                key=unit.key,
                top1=50.0,
                zero_shot=0.0,
                macs=candidate.cost.macs,
                params=candidate.cost.params,
                arch_hash=unit.arch_hash,
                point=unit.point,
                seconds=0.0,
            )
            run.write_result(unit.id, result=result)
            put_model(run.trial(unit.id) / "model")
            coordinator.complete(unit.id)
        assert coordinator.duplicates > 0
        coordinator = start(run, space=space)  # a driver that goes on knows them, too
    assert len(found) == len(set(found)) < 12


def test_points_to_begin_with_come_first_and_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    wanted = [{"budget": 0.7, "skip": 1, "lr": 1e-3}, {"budget": 0.5, "skip": 2, "lr": 2e-3}]
    for expected in ([0.7, 0.5], []):
        study = Study(run / "study.journal", SPACE.distributions, 0, start=wanted)
        coordinator = Coordinator(run, study, SPACE, SearchTable(trials=12), max_concurrent=9, seed=0)
        budgets = []
        for _ in range(3):
            unit = coordinator.next()
            assert unit is not None
            budgets.append(unit.point["budget"])
            work(run, unit)
            coordinator.complete(unit.id)
        assert budgets[: len(expected)] == expected
        assert not {0.7, 0.5} & set(budgets[len(expected) :])


def test_candidates_without_a_number_are_worst_and_end_nothing(tmp_path: Path) -> None:
    """Every third one diverges: none of them is promoted or on the front, and all are told as the worst."""
    run = make_run(tmp_path / "r", 18, **LADDER)
    coordinator = start(run, 18, max_concurrent=2, **LADDER)
    bad = set()
    while (unit := coordinator.next()) is not None:
        result = work(run, unit)
        if unit.number % 3 == 0:
            bad.add(unit.number)
            run.write_result(unit.id, result=replace(result, top1=(math.nan, math.inf)[unit.number % 2]))
        coordinator.complete(unit.id)
        again = start(run, 18, max_concurrent=2, **LADDER)
        assert again.front == coordinator.front
    assert coordinator.finished
    results = run.results()
    assert Counter(r.rung for r in results) == {0: 18, 1: 6, 2: 2}
    assert bad
    assert not bad & {r.trial for r in results if r.rung}
    assert not bad & {p["trial"] for p in run.front()}
    assert {t.number for t in trials(run / "study.journal") if t.values == [-math.inf, math.inf]} == bad
    journal = (run / "study.journal").read_bytes()
    assert start(run, 18, **LADDER).notes == []
    assert (run / "study.journal").read_bytes() == journal


def test_the_front_and_promotions_are_best_by_what_ranks(tmp_path: Path) -> None:
    """Made-up losses are lowest where nothing is skipped; top-1 mostly follows the budget."""
    promoted = []
    for rank_by, badness in (("auto", lambda r: r.loss), ("objective", lambda r: -r.top1)):
        search = {"rungs": [1, 3], "rank_by": rank_by}
        run = make_run(tmp_path / rank_by, 12, **search)
        climb(start(run, 12, max_concurrent=1, **search), run, Random(0), 0.0)
        current = [(badness(r), r.macs, r) for r in latest(run.results())]
        unbeaten = {
            r.id for bad, macs, r in current if not any(b <= bad and m <= macs and o != r for b, m, o in current)
        }
        assert {task_id(p["trial"], p["rung"]) for p in run.front()} == unbeaten
        promoted.append({r.trial for r in run.results() if r.rung == 1})
    assert promoted[0] != promoted[1]


def test_nothing_more_comes_once_all_that_run_are_on_the_last_rung(tmp_path: Path) -> None:
    """While any is below, it may be promoted, or make room for another one."""
    run = make_run(tmp_path / "r")
    coordinator = start(run, requested=6, max_concurrent=2, rungs=(1, 2), reduction_factor=3.0)
    said = list[tuple[bool, list[int]]]()
    live: list[Task] = []
    while not coordinator.done:
        while (unit := coordinator.next()) is not None:
            assert not any(exhausted for exhausted, _ in said)
            live.append(unit)
        said.append((coordinator.exhausted, sorted(unit.rung for unit in live)))
        unit = live.pop(0)
        work(run, unit)
        coordinator.complete(unit.id)
    assert [rungs for exhausted, rungs in said if exhausted] == [[1]]
    assert coordinator.exhausted
