"""What is said of lost trials, and which losses count against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from prunesweep.search.execution import losses
from prunesweep.search.execution.losses import FORGIVEN, Losses
from prunesweep.search.store.records import Task


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, int], tuple[int, list[str]]]:
    """Lose a process, or its node, so many times: what counts against the trial by Tune's account, and what is said."""
    monkeypatch.setattr(losses, "SETTLE", 0.0)
    monkeypatch.setattr(losses.state, "actors", lambda _: {"Address": {"NodeID": "it"}})
    monkeypatch.setattr(losses, "running_task", lambda *_: {"epoch": 4})
    task = Task(number=7, point={}, arch_hash="", key="", seed=0)

    def found(with_node: bool, times: int) -> tuple[int, list[str]]:
        monkeypatch.setattr(losses, "_is_there", lambda _: not with_node)
        said = list[str]()
        actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "actor"))
        metadata = SimpleNamespace(num_failures=0)
        trial: Any = SimpleNamespace(
            trial_id="a",
            config={"unit": asdict(task)},
            run_metadata=metadata,
            temporary_state=SimpleNamespace(ray_actor=actor),
        )
        run: Any = None
        told = Losses(run, said.append)
        for _ in range(times):
            told.on_trial_start(0, [], trial)
            metadata.num_failures += 1  # as Tune does, before it asks whether the trial may begin again
            told.on_trial_recover(0, [], trial)
            told.on_step_begin(0, [])
        return metadata.num_failures, said

    return found


def test_a_lost_process_counts_against_its_trial(lose: Callable[..., tuple[int, list[str]]]) -> None:
    assert lose(False, 2) == (2, ["trial 7 was lost with its process; it goes on elsewhere from epoch 4"] * 2)


def test_a_lost_node_does_not(lose: Callable[..., tuple[int, list[str]]]) -> None:
    """Unless so many go that the trial may be the cause."""
    counted, said = lose(True, FORGIVEN + 2)
    assert counted == 2
    assert set(said) == {"trial 7 was lost with its node; it goes on elsewhere from epoch 4"}
