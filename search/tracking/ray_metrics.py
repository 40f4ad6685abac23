"""Gauges of a search on a cluster, which Ray exports for Prometheus on every node's metrics port."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Gauge

from prunesweep.search.execution.coordinator import Coordinator

from .tracker import state

__all__ = ["gauges"]

MEANING = {
    "tasks_done": "Tasks of the search that have finished: candidates on a rung.",
    "tasks_failed": "Tasks that have failed.",
    "tasks_running": "Tasks that were handed out and have not ended.",
    "front_size": "Members of the front.",
    "hypervolume": "Hypervolume of the front, relative to the source.",
}


def gauges(name: str, coordinator: Coordinator, source: Mapping[str, Any]) -> Callable[[], None]:
    """Return a function that sets the gauges ``ray_prunesweep_*`` of a search, in a process that has joined a cluster.

    Args:
        name: of the search, the gauges' tag ``run``.
        coordinator: of the search.
        source: the source's costs and figures.
    """
    own = {key: Gauge(f"prunesweep_{key}", description=text, tag_keys=("run",)) for key, text in MEANING.items()}

    def changed() -> None:
        for key, value in state(coordinator, source).items():
            own[key].set(value, tags={"run": name})

    return changed
