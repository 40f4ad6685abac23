"""A trial's files on nodes that do not see the driver's folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prunesweep.models.io.objects import Objects
from prunesweep.search.execution import elsewhere
from prunesweep.search.execution.elsewhere import Access, PromotedFiles, unit_files
from prunesweep.search.store.lease import LEASES
from prunesweep.search.store.mirror import Mirror
from prunesweep.search.store.records import Result
from prunesweep.search.store.run import Run, Task
from prunesweep.search.store.stored import STOPPING
from prunesweep.training.jobs.training_job import CannotBegin, TrainingJob
from tests.object_store import Store, serving


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as found:
        yield found


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def task(rung: int = 0) -> Task:
    return Task(number=3, point={}, arch_hash="a", key="k", seed=0, rung=rung)


def test_a_trial_goes_on_elsewhere_from_the_state_that_was_published(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "LOOK", 0.02)
    monkeypatch.setattr(elsewhere, "STATE", 0.05)
    url, unit = store.url("runs/moves"), task()
    left, right = (Mirror(tmp_path / name, Objects(url)) for name in ("left", "right"))
    there, folder = Objects(url), "trials/r0-0003"

    class NodeLostError(Exception):
        pass

    def lost(*_: object) -> None:
        raise NodeLostError

    with pytest.raises(NodeLostError), unit_files(left, unit, {f"{folder}/cut.json": "{}"}):
        (left.path / folder / "state.safetensors").write_text("epoch 1")
        eventually(lambda: f"{folder}/state.safetensors" in there.list())
        (left.path / folder / "state.safetensors").write_text("epoch 2!")
        eventually(lambda: there.read(f"{folder}/state.safetensors") == b"epoch 2!")
        there.write(STOPPING, b"")
        eventually(Run(left.path).stop_file.exists)
        lost()

    with unit_files(right, unit, {f"{folder}/cut.json": "{}"}):
        assert (right.path / folder / "cut.json").read_text() == "{}"
        assert (right.path / folder / "state.safetensors").read_text() == "epoch 2!"
        (right.path / folder / "state.safetensors").unlink()
        (right.path / folder / "model").mkdir()
        (right.path / folder / "model" / "config.json").write_text("made")
        (right.path / folder / "result.json").write_text("the driver's")
        Run(right.path).board(3).mkdir(parents=True)
        (Run(right.path).board(3) / "events").write_text("tb")
    assert sorted(there.list()) == [
        STOPPING,
        "tb/trial-0003/events",
        f"{folder}/cut.json",
        f"{folder}/model/config.json",
    ]
    assert not (right.path / folder).exists()


def test_a_result_that_a_killed_driver_did_not_take_is_taken_by_the_next(store: Store, tmp_path: Path) -> None:
    """And the trial is not done again, unless what was handed in is damaged, or says that the trial failed."""
    url, unit, handed = store.url("runs/handed"), task(), "trials/r0-0003/handed.json"
    left, right, there = Mirror(tmp_path / "left", Objects(url)), Mirror(tmp_path / "right", Objects(url)), Objects(url)
    result = Result(3, 90.0, 90.0, 500, 10, "a", {}, 1.0, key="k")
    files = {"trials/r0-0003/cut.json": "{}"}
    with unit_files(left, unit, files):
        given = Run(left.path).write_result(unit.id, result=result)
    assert handed in there.list()
    with unit_files(right, unit, files):
        assert Run(right.path).read_result(unit.id) == given
    there.write(handed, b"{}")
    with unit_files(right, unit, files):
        assert Run(right.path).read_result(unit.id) is None
        Run(right.path).write_result(unit.id, error="its own")
    assert handed not in there.list()


def test_workers_of_a_trial_find_its_files_in_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it begins with, the state of workers that were lost, and the model that the first one hands in."""
    monkeypatch.setattr(elsewhere, "LOOK", 0.02)
    monkeypatch.setattr(elsewhere, "STATE", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "left"))
    access = Access(store.url("several/run"), 1, "head")
    there, unit, folder = Objects(access.url), access.unit("r0-0003"), "trials/r0-0003"
    there.write("source/config.json", b"of the source")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text("cut")
    job = TrainingJob(model=str(tmp_path / "start"), data="digits", recipe={}, teacher="/driver/source", stop_file="/s")
    unit.give(job)

    class NodeLostError(Exception):
        pass

    def begin(name: str) -> tuple[TrainingJob, Path]:
        Access.opened.cache_clear()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        place = tmp_path / f"{name} own"
        own = unit.seen_from(job, place)
        unit.bring(own, place)
        assert (Path(own.model) / "config.json").read_text() == "cut"
        assert (Path(str(own.teacher)) / "config.json").read_text() == "of the source"
        assert Path(str(own.teacher)).is_relative_to(tmp_path / name)
        return own, place

    own, place = begin("left")
    with pytest.raises(NodeLostError), unit.carrying(own, place):
        (place / "state.safetensors").write_text("epoch 1")
        eventually(lambda: f"{folder}/state.safetensors" in there.list())
        there.write(STOPPING, b"")
        eventually(Path(str(own.stop_file)).exists)
        there.delete(STOPPING)
        raise NodeLostError
    own, place = begin("right")
    assert (place / "state.safetensors").read_text() == "epoch 1"
    with unit.carrying(own, place):
        (place / "state.safetensors").write_text("epoch 2, the last")
    assert there.read(f"{folder}/state.safetensors") == b"epoch 2, the last"
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("trained")
    unit.hand_in(place / "model")
    unit.take(tmp_path / "driver" / "model")
    assert (tmp_path / "driver" / "model" / "config.json").read_text() == "trained"
    assert list(there.list()) == ["source/config.json"]

    there.write(f"{LEASES}000000002-other", b"{}")
    with pytest.raises(CannotBegin, match="another driver has taken over"):
        unit.hand_in(place / "model")


def test_workers_of_a_promotion_find_the_model_and_its_teacher(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    Access.opened.cache_clear()
    url = store.url("promotes/run")
    inputs = PromotedFiles(Access(url, 0, ""), "r1-0002")
    job = TrainingJob(
        model="/laptop/model", data="digits", recipe={}, teacher="/laptop/source", teacher_cache="/laptop"
    )
    own = inputs.seen_from(job, tmp_path / "own")
    objects = Objects(url)
    objects.write("source/config.json", b"of the source")
    objects.write("trials/r1-0002/model/config.json", b"of the model")
    Access.opened.cache_clear()
    inputs.bring(own, tmp_path / "own")
    assert (Path(own.model) / "config.json").read_text() == "of the model"
    assert (Path(str(own.teacher)) / "config.json").read_text() == "of the source"
    assert Path(str(own.teacher)).is_relative_to(tmp_path / "node")
    assert own.teacher_cache is None


def test_a_trial_waits_for_the_model_that_it_starts_from(store: Store, tmp_path: Path) -> None:
    url, unit = store.url("runs/waits"), task(rung=1)
    node, there, below = Mirror(tmp_path, Objects(url)), Objects(url), "trials/r0-0003"
    files = {f"{below}/result.json": json.dumps({"state": "finished", "result": {"has_model": True}})}

    def publish() -> None:
        there.write(f"{below}/model/config.json", b"{}")
        time.sleep(0.5)
        there.write(f"{below}/model/model.safetensors", b"weights")

    late = threading.Timer(0.5, publish)
    late.start()
    with unit_files(node, unit, files):
        assert (node.path / below / "model" / "model.safetensors").read_text() == "weights"
    late.join()
