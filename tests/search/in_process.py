"""Searches without Ray: the driver as it is, with trials one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import pytest

from prunesweep.search.execution import driver
from prunesweep.search.execution.coordinator import Coordinator, RunBroken
from prunesweep.search.execution.task import WorkerContext

__all__ = ["without_ray"]


class _Connection:
    """In the place of ``RayConnection``."""

    max_concurrent = fitting = 1
    most = None

    def __init__(self, *_: Any, **options: Any) -> None:
        self.on_death = options["on_death"]

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        pass


def without_ray(patch: pytest.MonkeyPatch, most: Callable[[], int] = lambda: 10**6) -> None:
    """Let ``run_search`` and ``resume_search`` work in this process.

    Args:
        patch: undoes it.
        most: the number of the trial in which the search is stopped, after its first epoch.
    """

    def execute(coordinator: Coordinator, _: Any, changed: Sequence[Callable[[], None]] = (), **options: Any) -> None:
        WorkerContext.of.cache_clear()  # processes of a search begin with it
        done = 0
        while not coordinator.done and (unit := coordinator.next()) is not None:
            done += 1
            if done == most():
                coordinator.stop()
            found = options["work"](coordinator.run.path, unit)
            if found["state"] == "broken":
                coordinator.stop()
                coordinator.complete(unit.id)
                raise RunBroken(found["reason"])
            coordinator.complete(unit.id)
            for tell in changed:
                tell()

    patch.setattr(driver, "RayConnection", _Connection)
    patch.setattr(driver, "execute", execute)
