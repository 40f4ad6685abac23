from __future__ import annotations

import os
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from prunesweep.search.store.study import Study

SPACE = {"budget": FloatDistribution(0.2, 0.9), "skip": IntDistribution(0, 3)}


def opened(journal: Path) -> optuna.Study:
    """The study as another process reads it: by Optuna alone."""
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(journal))))


def trials(journal: Path) -> list[optuna.trial.FrozenTrial]:
    return opened(journal).trials


def die_while_asking(journal: Path) -> None:
    """Leave a trial that was begun and has no point, as a driver does that dies before it has fixed one."""
    opened(journal).ask()


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
    with pytest.warns(UserWarning, match="torn"):
        study = Study(journal, SPACE, seed=0)
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
