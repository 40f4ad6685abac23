"""Say which trial was lost with its node or its process, and from where it goes on.

Tune gives a trial up whose process ended too often, as that may be the trial's own fault. That a node went is not.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray import tune
from ray._private import state

from prunesweep.search.store.progress import running_task
from prunesweep.search.store.run import Run, Task

__all__ = ["Losses"]

SETTLE = 1.0  # seconds: the node manager (raylet) of a node that goes may end a little later than its processes
REACH = 1.0  # seconds for a node manager to answer
FORGIVEN = 20  # losses of nodes that do not count against a trial; beyond them it may be what brings nodes down


class _Lost(NamedTuple):
    trial: Any  # Tune's
    unit: Task
    node: str | None  # where it was
    epoch: int | None  # that it had come to
    due: float  # when to look at the node


class Losses(tune.Callback):  # type: ignore[misc]
    """Tune's callback for units whose process was lost, which Tune starts again.

    Args:
        run: of the units.
        note: is told in a line for people.
    """

    def __init__(self, run: Run, note: Callable[[str], None]) -> None:
        self._run, self._note = run, note
        self._nodes: dict[str, str] = {}  # where Tune's trials are, by their names
        self._lost = list[_Lost]()
        self._forgiven = Counter[str]()  # losses of nodes, by Tune's names of trials

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Note on which node a unit begins."""
        found = state.actors(trial.temporary_state.ray_actor._actor_id.hex())
        self._nodes[trial.trial_id] = found.get("Address", {}).get("NodeID", "")

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Note that a unit was lost, and how far it had come."""
        unit, node = Task(**trial.config["unit"]), self._nodes.get(trial.trial_id)
        epoch = running_task(self._run, unit.id)["epoch"]
        self._lost.append(_Lost(trial, unit, node, epoch, time.monotonic() + SETTLE))

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """Tell of the units whose nodes can be judged by now."""
        now = time.monotonic()
        due = [lost for lost in self._lost if lost.due <= now]
        self._lost = [lost for lost in self._lost if lost.due > now]
        self._tell(due)

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        """Tell of the rest."""
        self._tell(self._lost)

    def _tell(self, lost: list[_Lost]) -> None:
        gone = {node: not _is_there(node) for node in {one.node for one in lost if one.node}}
        for trial, unit, node, epoch, _ in lost:
            rung = f" on rung {unit.rung}" if unit.rung else ""
            with_it = "node" if gone.get(node or "") else "process"
            if with_it == "node" and self._forgiven[trial.trial_id] < FORGIVEN:
                self._forgiven[trial.trial_id] += 1
                trial.run_metadata.num_failures = max(trial.run_metadata.num_failures - 1, 0)
            start = f"from epoch {epoch}" if epoch else "from its start"
            self._note(f"trial {unit.number}{rung} was lost with its {with_it}; it goes on elsewhere {start}")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its settings, and nobody reads them


def _is_there(node: str) -> bool:
    """Whether a node's manager answers: Ray counts a node as dead only seconds after it has gone."""
    found = next((one for one in ray.nodes() if one["NodeID"] == node and one["Alive"]), None)
    if found is None:
        return False
    try:
        socket.create_connection((found["NodeManagerAddress"], found["NodeManagerPort"]), timeout=REACH).close()
    except OSError:
        return False
    return True
