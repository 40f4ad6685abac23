"""Nodes that come when asked: whether a cluster has an autoscaler, and what people are told while nothing can run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

from ray._private import ray_constants
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

from prunesweep.search.config import ResourcesTable

__all__ = ["AHEAD", "Waiting", "has_autoscaler"]

AHEAD = 8  # units that are handed out, at least, before there is room for them, so that Ray asks for nodes
FIRST = 30.0  # seconds until it is said for the first time what is waited for; twice as long until the next time
LONGEST = 600.0  # seconds between two times


def has_autoscaler() -> bool:
    """Whether the cluster that this process has joined has an autoscaler that may bring nodes.

    Ray's autoscaler writes what it has seen into the cluster's store; on a cluster without one a process of the same
    name does, and calls every node a type of its own, ``node_ID``.
    """
    if is_autoscaler_v2():
        return True
    try:
        found = json.loads(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or b"{}")
        types = found["autoscaler_report"]["active_nodes"]
    except (ValueError, KeyError, TypeError):
        return False
    return any(not name.startswith("node_") for name in types)


class Waiting:
    """Says what is waited for and for how long, at growing intervals.

    Args:
        resources: of the search.
        note: is told each time, in a line for people.
        clock: seconds.
    """

    def __init__(
        self, resources: ResourcesTable, note: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._resources, self._note, self._clock = resources, note, clock
        self._since: float | None = None
        self._due, self._pause = math.inf, FIRST

    def look(self, waits: bool, have: str = "") -> None:
        """Look whether there is something to say.

        Args:
            waits: whether nothing can run now.
            have: what is there.
        """
        now = self._clock()
        if not waits:
            self._since, self._due, self._pause = None, math.inf, FIRST
        elif self._since is None:
            self._since, self._due = now, now + FIRST
        elif now >= self._due:
            self._pause = min(2 * self._pause, LONGEST)
            self._due = now + self._pause
            wanted = f"{self._resources.cpus_per_trial} CPUs and {self._resources.gpus_per_trial:g} GPUs"
            self._note(f"waiting for a node with {wanted} for {now - self._since:.0f} s{have}")
