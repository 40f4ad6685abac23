"""Tell tools of a search from a thread of its own, so that none of them can stop it or hold it up."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.store.front import hypervolume
from prunesweep.search.store.run import Run

from .backends import Backend, backends

__all__ = ["Tracker", "tracking"]

END = 60.0  # seconds at the end of a search for what has not been told yet
INTERRUPTED = 5.0  # where it is ended by an error, or by Ctrl-C
LIMIT = 20_000  # things to tell that wait; more are dropped, as of a tool that does not answer


class _Teller(threading.Thread):
    """Tells one tool what it is given, in order; the first error is its end, and is noted once."""

    def __init__(self, backend: Backend, note: Callable[[str], None]) -> None:
        super().__init__(daemon=True, name=f"tells {backend.name}")
        self._backend, self._note = backend, note
        self._given: queue.Queue[Callable[[], None] | None] = queue.Queue(LIMIT)
        self._broken = False
        self.start()

    def run(self) -> None:
        try:
            self._backend.open()
            while (do := self._given.get()) is not None:
                do()
        except BaseException as error:  # a tool may even exit
            self._broken = True
            self._warn(f"{type(error).__name__}: {error}".partition("\n")[0][:300])

    def _warn(self, reason: str) -> None:
        self._note(f"warning: logging.{self._backend.name} is told no more, the search goes on: {reason}")

    def give(self, do: Callable[[], None]) -> None:
        if not self._broken:
            with contextlib.suppress(queue.Full):
                self._given.put_nowait(do)

    def end(self, patience: float) -> None:
        with contextlib.suppress(queue.Full):
            self._given.put_nowait(None)
        self.join(patience)
        if self.is_alive():
            self._broken = True
            self._warn(f"it has not taken everything within {patience:g} s of the search's end")


class Tracker:
    """Tells tools what has changed.

    Args:
        found: the tools, not opened yet.
        coordinator: of the search.
        source: the source's costs and figures.
        note: is told in a line for people, once for a tool that fails.
    """

    def __init__(
        self,
        found: Sequence[Backend],
        coordinator: Coordinator,
        source: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self._coordinator, self._source = coordinator, source
        self._tellers = [(_Teller(backend, note), backend) for backend in found]
        self._told = self._settled = 0

    def changed(self) -> None:
        """Tell of the results that have come since; of all of them the first time."""
        coordinator = self._coordinator
        if not self._tellers or (coordinator.settled == self._settled and self._told):
            return
        new, self._told, self._settled = (
            coordinator.results[self._told :],
            len(coordinator.results),
            coordinator.settled,
        )
        values, step = state(coordinator, self._source), coordinator.settled
        for teller, backend in self._tellers:
            for result in new:
                teller.give(lambda backend=backend, result=result: backend.result(result))  # type: ignore[misc]
            teller.give(lambda backend=backend: backend.state(step, values))  # type: ignore[misc]

    def close(self, front: Sequence[Mapping[str, Any]], *, finished: bool, patience: float = END) -> None:
        """Tell of the front, and wait until all has been told, but no longer than ``patience`` seconds."""
        for teller, backend in self._tellers:
            teller.give(lambda backend=backend: backend.close(front, finished=finished))  # type: ignore[misc]
        for teller, _ in self._tellers:
            teller.end(patience)


def state(coordinator: Coordinator, source: Mapping[str, Any]) -> dict[str, float]:
    """How far a search is: what tools plot."""
    return {
        "tasks_done": float(len(coordinator.results)),
        "tasks_failed": float(len(coordinator.failures)),
        "tasks_running": float(coordinator.live),
        "front_size": float(len(coordinator.best)),
        "hypervolume": float(hypervolume(coordinator.best, source, coordinator.search.objectives)),
    }


@contextlib.contextmanager
def tracking(
    run: Run, config: SearchConfig, coordinator: Coordinator, source: Mapping[str, Any], note: Callable[[str], None]
) -> Iterator[Tracker]:
    """Tell the tools of ``[logging]`` of a search for the time of a ``with`` block, and of its front at the end.

    Args:
        run, config, coordinator: of the search.
        source: the source's costs and figures.
        note: as for ``Tracker``.

    Yields:
        What is to be told of changes.
    """
    found = backends(config.logging, run, config.name, config.model_dump(mode="json", exclude_none=True))
    tracker = Tracker(found, coordinator, source, note)
    tracker.changed()
    finished, patience = False, INTERRUPTED
    try:
        yield tracker
        finished, patience = coordinator.finished, END
    finally:
        tracker.changed()
        tracker.close(run.front() if found and run.path.is_dir() else [], finished=finished, patience=patience)
