"""A run's journal and the files of its trials, damaged, lost or of another time: the search goes on from the rest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError, save
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.promote import choose
from prunesweep.search.store.records import sealed
from prunesweep.search.store.run import Run, Task, task_id
from prunesweep.search.store.study import RESULTS
from tests.generate import random_model
from tests.search.execution.test_coordinator import LADDER, SPACE, start, work
from tests.search.helpers import ARCH, make_older, make_run
from tests.search.store.test_study import trials

DONE, ASKED = 6, 9


def go_on(coordinator: Coordinator, count: int = 99) -> list[Task]:
    done: list[Task] = []
    while len(done) < count and (unit := coordinator.next()) is not None:
        work(coordinator.run, unit)
        coordinator.complete(unit.id)
        done.append(unit)
    return done


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six trials have ended and a seventh was begun. ``older`` is the journal as it was after the third."""
    run = make_run(tmp_path_factory.mktemp("stopped") / "r", ASKED)
    coordinator = start(run, ASKED, max_concurrent=1)
    go_on(coordinator, 3)
    shutil.copy(run / "study.journal", run / "older")
    go_on(coordinator, DONE - 3)
    assert coordinator.next() is not None
    return run


@pytest.fixture
def run(stopped: Run, tmp_path: Path) -> Run:
    shutil.copytree(stopped.path, tmp_path / "r")
    return Run(tmp_path / "r")


def results(run: Run) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in run.path.glob("trials/*/result.json")}


def check(run: Run) -> None:
    """Everything is done, every result is its task's, and the journal says what the files say."""
    found = run.results()
    for result in found:
        task = run.read_task(result.id)
        assert (task.key, task.point) == (result.key, result.point)
        assert SPACE.decode(result.point).key == result.key
    first = [r for r in found if r.rung == 0]
    assert len(first) == ASKED
    told = {
        t.number: (t.params["budget"], t.values) for t in trials(run / "study.journal") if t.state.name == "COMPLETE"
    }
    assert told == {r.trial: (r.point["budget"], [r.top1, float(r.macs)]) for r in first}
    recorded = {t.user_attrs["unit"]: t.values for t in trials(run / "study.journal", RESULTS)}
    assert recorded == {r.id: [r.top1, float(r.macs)] for r in found}


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Run], None]:
    def damage(run: Run) -> None:
        journal = run / "study.journal"
        journal.write_bytes(b"\n".join(change(journal.read_bytes().split(b"\n"))))

    return damage


def of_another_run(run: Run) -> None:
    (run / "study.journal").unlink()
    other = start(run.__class__(make_run(run.path.parent / "other", 20).path), 20, max_concurrent=1, seed=5)
    go_on(other, 8)
    shutil.copy(other.run / "study.journal", run / "study.journal")


JOURNALS: dict[str, Callable[[Run], Any]] = {
    "absent": lambda run: (run / "study.journal").unlink(),
    "empty": lambda run: (run / "study.journal").write_bytes(b""),
    "older": lambda run: shutil.move(run / "older", run / "study.journal"),
    "of another run": of_another_run,
    "last lines lost": lines(lambda n: [*n[:-12], b""]),
    "a record lost": lines(lambda n: n[:13] + n[14:]),  # of a proposal
    "first lines lost": lines(lambda n: n[5:]),
    "blank line": lines(lambda n: [*n[:12], b"", *n[12:]]),
    "merged": lines(lambda n: [*n[:12], n[12] + n[13], *n[14:]]),
    "torn": lines(lambda n: [*n[:12], n[12][:9], *n[13:]]),
    "zeros": lines(lambda n: [*n[:12], bytes(len(n[12])), *n[13:]]),
    "no record": lines(lambda n: [*n[:12], b"[1, 2]", *n[13:]]),
}


@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_that_is_not_of_these_files_is_made_again(run: Run, name: str) -> None:
    before = results(run)
    JOURNALS[name](run)
    coordinator = start(run, ASKED, max_concurrent=1)
    begun, *new = go_on(coordinator)
    assert begun.number == DONE  # the one that was begun comes first
    assert len(new) == ASKED - DONE - 1
    assert all(task.number > DONE for task in new)
    assert before.items() <= results(run).items()  # none was written again
    check(run)
    assert any("was made again from the files of 6 results" in note for note in coordinator.notes)
    kept = list(run.path.glob("study.journal.*"))
    assert len(kept) == (name not in ("absent", "empty"))
    assert all(f"kept as {path.name}" in "\n".join(coordinator.notes) for path in kept)
    assert start(run, ASKED).notes == []


def test_a_whole_journal_is_left_as_it_is(run: Run) -> None:
    before = (run / "study.journal").read_bytes()
    assert start(run, ASKED).notes == []
    assert (run / "study.journal").read_bytes() == before


def test_numbers_lie_above_folders_without_a_task(run: Run) -> None:
    run.trial("r0-0041").mkdir()
    (run / "study.journal").unlink()
    assert [task.number for task in go_on(start(run, ASKED))] == [DONE, 42, 43]
    check(run)


def test_a_search_over_rungs_goes_on_without_its_journal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", ASKED, **LADDER)
    done = go_on(start(run, ASKED, **LADDER), 8)
    while len(done) < 13:
        (run / "study.journal").unlink()
        done += go_on(start(run, ASKED, **LADDER), 2)
    coordinator = start(run, ASKED, **LADDER)
    assert coordinator.finished
    assert len({task.id for task in done}) == 13
    assert run.status()["rungs"] == [9, 3, 1]
    check(run)


def zeros(path: Path) -> None:
    half = len(path.read_bytes()) // 2
    path.write_bytes(path.read_bytes()[:half].ljust(2 * half, b"\0"))


def digit(path: Path) -> None:
    text = path.read_text()
    path.write_text(re.sub(r'"top1": (\d)', lambda m: f'"top1": {9 - int(m[1])}', text))
    assert path.read_text() != text


def of_another_trial(path: Path) -> None:
    shutil.copy(path.parents[1] / "r0-0001" / "result.json", path)


def of_another_candidate(path: Path) -> None:
    """As where a task was written over an old one of its number."""
    run, number = Run(path.parents[2]), 3
    data = json.loads(path.read_text())["result"]
    candidate = SPACE.decode({"budget": 0.42, "skip": 2, "lr": 2e-3})
    task = Task(number, {**data["point"], "budget": 0.42}, candidate.arch.hash, candidate.key, 1)
    run.write_task(task)
    run.write_cut(number, candidate.decision)


RESULT_FILES: dict[str, Callable[[Path], Any]] = {
    "zeros": zeros,
    "digit": digit,
    "empty": lambda path: path.write_text(""),
    "null": lambda path: path.write_text("null"),
    "no result": lambda path: path.write_text('{"state": "finished"}'),
    "of another trial": of_another_trial,
}


@pytest.mark.parametrize("name", RESULT_FILES)
def test_a_damaged_result_is_named_and_made_again(run: Run, name: str) -> None:
    path = run.trial("r0-0003") / "result.json"
    whole = path.read_text()
    RESULT_FILES[name](path)
    with pytest.warns(UserWarning, match="does the trial again"):
        assert [r.trial for r in run.results()] == [0, 1, 2, 4, 5]
    coordinator = start(run, ASKED, max_concurrent=1)
    assert f"{path} is damaged" in coordinator.notes[0]
    assert "kept as result.json.damaged-1; the trial is done again" in coordinator.notes[0]
    assert [task.number for task in go_on(coordinator)] == [3, 6, 7, 8]
    assert path.read_text() == whole
    check(run)


@pytest.fixture
def ladder(tmp_path: Path) -> Run:
    """A search over rungs that has ended."""
    run = make_run(tmp_path / "r", ASKED, **LADDER)
    go_on(start(run, ASKED, **LADDER))
    return run


def top(run: Run) -> Any:
    return max(run.front(), key=lambda point: point["rung"])


@pytest.mark.parametrize("spec", [True, False])
def test_what_a_rung_below_gave_does_not_stand_for_a_damaged_result(ladder: Run, *, spec: bool) -> None:
    before, member, whole = ladder.front(), top(ladder), ladder.status()["hypervolume"]
    unit = f"r{member['rung']}-{member['trial']:04d}"
    assert member["rung"] > 0
    zeros(ladder.trial(unit) / "result.json")
    if not spec:
        zeros(ladder.trial(unit) / "spec.json")
    with pytest.warns(
        UserWarning, match=rf"{unit}/result.json is damaged.*'prunesweep resume .*' does the trial again"
    ):
        shown = ladder.front()
    assert member["trial"] not in {point["trial"] for point in shown}
    assert all((ladder / point["model"]).is_dir() for point in shown)
    with pytest.warns(UserWarning, match="is damaged"):
        assert member["trial"] not in {result.trial for result in ladder.current()}
    with pytest.warns(UserWarning, match="is damaged"):
        assert 0 < ladder.status()["hypervolume"] < whole
    coordinator = start(ladder, ASKED, **LADDER)
    assert all((ladder / point["model"]).is_dir() for point in coordinator.front)
    assert unit in {task.id for task in go_on(coordinator)}
    assert ladder.front() == before


def test_a_member_of_the_front_whose_model_is_gone_is_named_and_made_again(ladder: Run) -> None:
    before, member = ladder.front(), top(ladder)
    shutil.rmtree(ladder / member["model"])
    with pytest.warns(UserWarning, match=f"{member['model']} is gone: trial {member['trial']} is not shown"):
        shown = ladder.front()
    assert [point for point in before if point != member] == [point for point in shown if point in before]
    assert all((ladder / point["model"]).is_dir() for point in shown)
    coordinator = start(ladder, ASKED, **LADDER)
    assert "is gone, so its result.json is of no use: kept as result.json.damaged-1" in coordinator.notes[0]
    assert [(task.number, task.rung) for task in go_on(coordinator)] == [(member["trial"], member["rung"])]
    assert ladder.front() == before


def test_a_member_of_the_front_whose_model_is_damaged_is_named_and_made_again(ladder: Run) -> None:
    before, member = ladder.front(), top(ladder)
    zeros(ladder / member["model"] / "model.safetensors")
    with pytest.warns(UserWarning, match=rf"model.safetensors is damaged.*trial {member['trial']} is not shown"):
        assert member not in ladder.front()
    with (
        pytest.warns(UserWarning, match="is not shown"),
        pytest.raises(UserError, match=r"model.safetensors is damaged[\s\S]*The front lacks it: 'prunesweep resume"),
    ):
        choose(ladder, top=1)
    coordinator = start(ladder, ASKED, **LADDER)
    assert "model.safetensors is damaged" in coordinator.notes[0]
    assert "kept as model.damaged-1" in coordinator.notes[0]
    assert [(task.number, task.rung) for task in go_on(coordinator)] == [(member["trial"], member["rung"])]
    assert ladder.front() == before


def test_a_member_of_the_front_whose_model_was_replaced_is_named_and_made_again(ladder: Run) -> None:
    """By a sound model of the same shapes, which nothing in its own folder tells."""
    before, member = ladder.front(), top(ladder)
    save(random_model(ARCH, 1), ladder / member["model"])
    with pytest.warns(
        UserWarning, match=rf"{member['model']} holds another model.*trial {member['trial']} is not shown"
    ):
        assert member not in ladder.front()
    with pytest.warns(UserWarning, match="is not shown"), pytest.raises(UserError, match=r"holds another model"):
        choose(ladder, top=1)
    coordinator = start(ladder, ASKED, **LADDER)
    assert "holds another model" in coordinator.notes[0]
    assert [(task.number, task.rung) for task in go_on(coordinator)] == [(member["trial"], member["rung"])]
    assert ladder.front() == before


def test_results_that_do_not_say_what_their_weights_are_are_believed(ladder: Run) -> None:
    """As an earlier version wrote them."""
    before = ladder.front()
    for path in ladder.path.glob("trials/*/result.json"):
        data = json.loads(path.read_text())
        del data["digest"], data["result"]["weights"]
        path.write_text(sealed(data))
    assert [point["trial"] for point in ladder.front()] == [point["trial"] for point in before]
    assert start(ladder, ASKED, **LADDER).notes == []


def test_a_damaged_result_below_a_member_of_the_front_is_made_again_and_replaces_nothing(ladder: Run) -> None:
    before, member = ladder.front(), top(ladder)
    (ladder.trial(task_id(member["trial"])) / "result.json").write_text("")
    assert [(task.number, task.rung) for task in go_on(start(ladder, ASKED, **LADDER))] == [(member["trial"], 0)]
    assert ladder.front() == before


def test_a_result_of_another_candidate_than_its_task_is_refused(run: Run) -> None:
    of_another_candidate(run.trial("r0-0003") / "result.json")
    coordinator = start(run, ASKED, max_concurrent=1)
    assert "is the result of another candidate: kept as result.json.damaged-1" in coordinator.notes[0]
    assert [r.trial for r in coordinator.results] == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("spec", [True, False])
def test_a_result_with_another_point_is_refused(run: Run, *, spec: bool) -> None:
    """As an older version wrote it, without a digest, and then edited."""
    make_older(run)
    path = run.trial("r0-0003") / "result.json"
    data = json.loads(path.read_text())
    del data["digest"], data["result"]["point"]["skip"]
    path.write_text(json.dumps(data))
    if not spec:
        (run.trial("r0-0003") / "spec.json").unlink()
    coordinator = start(run, ASKED, max_concurrent=1)
    assert str(path) in coordinator.notes[0]
    assert ("is the result of another candidate" if spec else "the point lacks skip") in coordinator.notes[0]
    go_on(coordinator)
    check(run)


def test_a_damaged_task_is_made_again_from_its_result(run: Run) -> None:
    path = run.trial("r0-0003") / "spec.json"
    whole, before = path.read_text(), results(run)
    zeros(path)
    coordinator = start(run, ASKED, max_concurrent=1)
    assert "kept as spec.json.damaged-1" in coordinator.notes[0]
    assert path.read_text() == whole
    go_on(coordinator)
    assert before.items() <= results(run).items()
    check(run)


@pytest.mark.parametrize("journal", [True, False])
def test_a_damaged_task_without_a_result_is_done_if_the_journal_knows_it(run: Run, *, journal: bool) -> None:
    path = run.trial(f"r0-000{DONE}") / "spec.json"
    point = json.loads(path.read_text())["point"]
    zeros(path)
    if not journal:
        (run / "study.journal").unlink()
    done = go_on(start(run, ASKED, max_concurrent=1))
    assert [task.number for task in done] == ([6, 7, 8] if journal else [7, 8, 9])
    assert (done[0].point == point) is journal
    check(run)


@pytest.mark.parametrize("lost", [True, False])
def test_a_decision_that_is_lost_is_made_again(run: Run, *, lost: bool) -> None:
    path = run.trial(f"r0-000{DONE}") / "cut.json"
    whole = path.read_text()
    if lost:
        path.unlink()
    else:
        zeros(path)
    (begun, *_) = go_on(start(run, ASKED, max_concurrent=1))
    assert begun.number == DONE
    assert path.read_text() == whole


def test_training_does_not_go_on_from_the_state_of_another_candidate(run: Run) -> None:
    """The task's key is that of a decision which is lost, and its point means another one now."""
    folder = run.trial(f"r0-000{DONE}")
    task = json.loads((folder / "spec.json").read_text())
    del task["digest"]
    run.write_task(Task(**{**task, "key": "0123456789abcdef"}))
    (folder / "state.safetensors").write_text("of the other one")
    coordinator = start(run, ASKED, max_concurrent=1)
    assert "its decision, cut.json, is lost, and its point means another one" in coordinator.notes[0]
    (begun, *_) = go_on(coordinator)
    assert begun.point == task["point"]
    assert not (folder / "state.safetensors").exists()
    check(run)
