from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from random import Random

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from prunesweep.models import UserError
from prunesweep.search.config import SearchTable
from prunesweep.search.store.front import pareto_front
from prunesweep.search.store.run import Result
from prunesweep.search.store.study import PROPOSALS, RESULTS, Study, make_sampler

SPACE = {"budget": FloatDistribution(0.2, 0.9), "skip": IntDistribution(0, 3)}


def load(journal: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(journal))))


def trials(journal: Path, name: str = PROPOSALS) -> list[optuna.trial.FrozenTrial]:
    return load(journal, name).trials


def die_while_asking(journal: Path) -> None:
    """Leave a trial that was begun and has no point, as a driver does that dies before it has fixed one."""
    load(journal, PROPOSALS).ask()


def run(study: Study, count: int) -> list[dict[str, float]]:
    points = []
    for _ in range(count):
        number, point = study.ask()
        points.append(point)
        study.tell(number, [100 * point["budget"], int(1000 * point["budget"])])
    return points


def test_same_seed_same_proposals(tmp_path: Path) -> None:
    first, second = (run(Study(tmp_path / name, SPACE, seed=3), 20) for name in "ab")
    other = run(Study(tmp_path / "c", SPACE, seed=4), 20)
    assert first == second
    assert first != other


def test_after_a_resume_the_sampler_does_not_repeat_itself(tmp_path: Path) -> None:
    first = run(Study(tmp_path / "j", SPACE, seed=3), 6)
    second = run(Study(tmp_path / "j", SPACE, seed=3), 6)
    assert not {p["budget"] for p in first} & {p["budget"] for p in second}
    assert len(trials(tmp_path / "j")) == 12


def test_running_trials_are_found_again(tmp_path: Path) -> None:
    study = Study(tmp_path / "j", SPACE, seed=0)
    run(study, 2)
    number, point = study.ask()
    die_while_asking(tmp_path / "j")
    assert Study(tmp_path / "j", SPACE, seed=0).running() == {number: point, number + 1: None}


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    run(Study(journal, SPACE, seed=0), 5)
    whole = journal.read_bytes()
    os.truncate(journal, len(whole) - 20)
    study = Study(journal, SPACE, seed=0)
    assert study.notes == ["j: the last line was torn by a kill; it is cut off"]
    assert list(study.running()) == [4]  # the cut trial runs again, it is not lost
    study.tell(4, [1.0, 2])
    run(study, 1)
    assert [t.state for t in trials(journal)] == [TrialState.COMPLETE] * 6


def test_a_dead_drivers_lock_does_not_delay(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    run(Study(journal, SPACE, seed=0), 1)
    os.symlink(journal, f"{journal}.lock")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Study(journal, SPACE, seed=0), 1)
    assert len(trials(journal)) == 2


def test_telling_twice_changes_nothing(tmp_path: Path) -> None:
    study = Study(tmp_path / "j", SPACE, seed=0)
    number, _ = study.ask()
    study.tell(number, [50.0, 10])
    study.tell(number, [60.0, 20])
    study.fail(number)
    assert trials(tmp_path / "j")[0].values == [50.0, 10.0]


def result(number: int, top1: float, macs: int, rung: int = 0, **other: object) -> Result:
    point = {"budget": 0.2 + number / 100, "skip": number % 4, "method": "nvit"}
    return Result(number, top1, 1.0, macs, 10, f"hash {number}", point, 2.0, rung=rung, **other)  # type: ignore[arg-type]


def test_best_trials_of_the_results_are_the_front(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    study = Study(journal, SPACE, seed=0)
    results = [
        result(0, 48.22, 100, epochs=1),
        result(1, 60.0, 300),
        result(0, 83.11, 100, rung=1, epochs=4),
        result(2, 40.0, 50, has_model=False),  # screened only
        result(3, math.nan, 20),
        result(4, 90.0, 400, ppl=None, latency_ms=3.0),
    ]
    study.record(results[:3])
    study.record(results)  # those that are there are not added again
    found = load(journal, RESULTS)
    assert [t.state.name for t in found.trials] == ["COMPLETE"] * 3 + ["PRUNED", "FAIL", "COMPLETE"]
    front = pareto_front([r for r in results if r.has_model])
    best = sorted(found.best_trials, key=lambda t: t.values[1])
    assert [(t.user_attrs["candidate"], t.values) for t in best] == [(r.trial, [r.top1, r.macs]) for r in front]
    assert [(r.trial, r.rung) for r in front] == [(0, 1), (4, 0)]
    attributes = best[0].user_attrs
    assert {"rung": 1, "unit": "r1-0000", "epochs": 4, "arch_hash": "hash 0"}.items() <= attributes.items()
    assert attributes["model"] == "trials/r1-0000/model"
    assert found.trials[3].user_attrs["model"] is None
    assert found.trials[4].user_attrs["top1"] is None
    assert best[0].duration is not None
    assert best[0].duration.total_seconds() == pytest.approx(2.0, abs=0.1)


def test_best_trials_follow_a_candidate_that_got_worse(tmp_path: Path) -> None:
    """The better result of its first rung is no longer best once the search has ended, and stays to be learned from."""
    journal = tmp_path / "j"
    study = Study(journal, SPACE, seed=0)
    results = [result(0, 99.11, 100), result(1, 60.0, 90), result(0, 98.0, 100, rung=1), result(2, 98.5, 110)]
    study.record(results)
    study.settle(results)
    found = load(journal, RESULTS)
    assert [t.state.name for t in found.trials] == ["PRUNED", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert found.trials[0].values == [99.11, 100]
    assert {t.user_attrs["unit"] for t in found.best_trials} == {"r0-0001", "r1-0000", "r0-0002"}
    again = Study(journal, SPACE, seed=0)
    again.record(results)
    again.settle(results)
    assert len(load(journal, RESULTS).trials) == 4


def test_both_studies_say_whose_they_are_and_what_they_show(tmp_path: Path) -> None:
    for _ in range(2):
        Study(tmp_path / "j", SPACE, seed=0, name="digits")
    size = (tmp_path / "j").stat().st_size
    Study(tmp_path / "j", SPACE, seed=0, name="digits")
    assert (tmp_path / "j").stat().st_size == size  # opening writes nothing
    for name in (PROPOSALS, RESULTS):
        study = load(tmp_path / "j", name)
        assert study.user_attrs["run"] == "digits"
        assert study.metric_names == ["top1", "macs"]
        notes = study._storage.get_study_system_attrs(study._study_id)
        assert notes["dashboard:note_ver"] == 1
        assert "search **digits**" in notes["dashboard:note_str:0"]


def test_a_journal_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """It has one study, ``r0``, without results and notes."""
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "j")))
    older = optuna.create_study(study_name="r0", storage=storage, directions=["maximize", "minimize"])
    older.enqueue_trial({"budget": 0.5, "skip": 1})
    for _ in range(2):
        older.ask(SPACE)
    older.tell(0, [50.0, 10])
    study = Study(tmp_path / "j", SPACE, seed=0)
    assert list(study.running()) == [1]
    study.record([result(0, 50.0, 10)])
    assert study.ask()[0] == 2
    assert [t.user_attrs["unit"] for t in trials(tmp_path / "j", RESULTS)] == ["r0-0000"]
    assert len(trials(tmp_path / "j", "r0")) == 3


@pytest.mark.parametrize("objectives", [("top1", "macs"), ("macs", "top1")])
def test_a_search_that_is_opened_again_proposes_as_one_that_was_not(
    tmp_path: Path, objectives: tuple[str, ...]
) -> None:
    """Random state follows from the seed and the trial's number, and what is known from the results."""
    found = []
    for name, every in (("a", 100), ("b", 3)):
        points, known = [], []
        for number in range(24):
            if number % every == 0:
                study = Study(tmp_path / name, SPACE, 3, objectives=objectives)
                study.record(reversed(known))
            asked, point = study.ask()
            macs = int(1000 * point["budget"])
            known.append(Result(asked, 60.0 - point["skip"] + 20 * point["budget"], 0.0, macs, 1, "", point, 0.0))
            study.tell(asked, [macs, known[-1].top1] if objectives[0] == "macs" else [known[-1].top1, macs])
            study.record(known[-1:])
            points.append(point)
        found.append(points)
    assert found[0] == found[1]
    assert sum(p["skip"] == 0 for p in found[0][12:]) > 6  # it learned


@pytest.mark.parametrize("objectives", [("top1", "macs"), ("ppl", "macs")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_candidate_without_a_number_does_not_switch_the_model_off(
    tmp_path: Path, objectives: tuple[str, ...], value: float
) -> None:
    """Of 60 results one is no number: it counts as worst, which is said once, and the model goes on proposing."""
    space = {"budget": SPACE["budget"], "skip": IntDistribution(0, 8), "width": FloatDistribution(0, 1)}
    random, study = Random(0), Study(tmp_path / "j", space, seed=0, objectives=objectives)
    for number in range(60):
        point = {"budget": random.uniform(0.2, 0.9), "skip": random.randint(0, 8), "width": random.random()}
        loss = (point["skip"] - 6) ** 2 / 4 + 20 * (point["width"] - 0.3) ** 2
        quality = {"top1": value, "ppl": value} if number == 30 else {"top1": 90 - loss, "ppl": math.exp(1 + loss / 10)}
        macs = int(1000 * point["budget"])
        study.record(
            [Result(number, zero_shot=0.0, macs=macs, params=1, arch_hash="", point=point, seconds=0.0, **quality)]
        )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        points = [study.ask()[1] for _ in range(15)]
    assert len([w for w in said if "not a finite number: it counts as worse than all others" in str(w.message)]) == 1
    assert sum(abs(p["skip"] - 6) <= 1 for p in points) >= 11  # a third of random ones
    assert sum(abs(p["width"] - 0.3) <= 0.2 for p in points) >= 11


WORST = {"top1": [-math.inf, math.inf], "ppl": [math.inf, math.inf]}


@pytest.mark.parametrize(
    ("sampler", "quality"),
    [("tpe", "top1"), ("tpe", "ppl"), ("nsga2", "top1"), ("nsga3", "ppl"), ("gp", "top1"), ("random", "top1")],
)
def test_candidates_without_a_number_are_the_worst_for_every_sampler(
    tmp_path: Path, quality: str, sampler: str
) -> None:
    """Candidates with many skipped blocks, the cheapest ones, diverge: a sampler that learns keeps away from them."""
    objectives, number_of = (quality, "macs"), 60 if sampler != "gp" else 18
    study = Study(tmp_path / "j", SPACE, 0, objectives=objectives, sampler=sampler, trials=number_of)
    bad = []
    for number in range(number_of):
        asked, point = study.ask()
        bad.append(number < 3 or point["skip"] >= 2)
        figure = (
            (math.nan, math.inf)[number % 2]
            if bad[-1]
            else {"top1": 90 * point["budget"], "ppl": 9 / point["budget"]}[quality]
        )
        macs = int(1000 * point["budget"]) - 100 * int(point["skip"])
        study.tell(asked, [figure, macs])
    told = trials(tmp_path / "j")
    assert [t.number for t in told if t.values == WORST[quality]] == [n for n, one in enumerate(bad) if one]
    assert {t.state for t in told} == {TrialState.COMPLETE}
    if sampler in ("tpe", "gp"):
        assert sum(bad[-number_of // 3 :]) <= number_of // 10  # a half of random ones


def test_a_sampler_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'excess' is now called 'budget_gp'"):
        Study(tmp_path / "a", SPACE, 0, sampler="excess")
    with pytest.raises(UserError, match="sampler 'cma' is none; known: auto, budget_gp, tpe"):
        make_sampler("cma", SPACE, 10, 0)
    with pytest.raises(ValueError, match="'excess' is now called 'budget_gp'; change it in the file"):
        SearchTable.model_validate({"sampler": "excess"})


def test_values_are_what_candidates_are_ranked_by(tmp_path: Path) -> None:
    """Of a ladder that screens first: the divergence of untrained candidates, the loss of trained ones."""
    journal = tmp_path / "j"
    study = Study(journal, SPACE, seed=0, rank_by="auto", rungs=(0, 3))
    screened = result(0, 90.0, 100, kl=0.5, loss=2.0, has_model=False)
    trained = [
        result(0, 98.0, 100, rung=1, epochs=3, kl=0.4, loss=0.1),
        result(1, 99.0, 100, rung=1, epochs=3, kl=0.1, loss=0.2),
    ]
    number, _ = study.ask()
    study.tell(number, study.ranking.values(screened))
    study.record([screened, *trained])
    proposals, results = load(journal, PROPOSALS), load(journal, RESULTS)
    assert (proposals.metric_names, results.metric_names) == (["kl", "macs"], ["loss", "macs"])
    assert proposals.trials[0].values == [0.5, 100]
    assert [t.values for t in results.trials] == [[0.5, 100], [0.1, 100], [0.2, 100]]
    assert [t.user_attrs["unit"] for t in results.best_trials] == ["r1-0000"]
    assert results.best_trials[0].user_attrs["top1"] == 98.0
