"""Work in other processes of the cluster that this process has joined, as if it were done here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prunesweep.models import UserError
from prunesweep.search.config import ResourcesTable
from prunesweep.training.jobs.scoring import Progress
from prunesweep.training.named_code import allow_modules, allowed_modules
from prunesweep.training.signals import handling

from .coordinator import SearchFailed
from .growth import Waiting

__all__ = ["run_on_worker", "run_on_workers"]

T = TypeVar("T")

LOOK, TELL, END = 0.5, 0.5, 10.0  # seconds: between looks at the work, between its reports, for it to end when asked
RESTARTS = 2  # of work whose process was lost
WAITING = "waiting for a worker"


def run_on_worker(
    work: Callable[[Progress], T],
    resources: ResourcesTable,
    progress: Progress,
    *,
    note: Callable[[str], None] = lambda _: None,
) -> T:
    """Call ``work`` on one worker; see ``run_on_workers``."""
    (found,) = run_on_workers([work], resources, progress, note=note)
    return found


def run_on_workers(
    works: Sequence[Callable[[Progress], T]],
    resources: ResourcesTable,
    progress: Progress,
    *,
    note: Callable[[str], None] = lambda _: None,
) -> list[T]:
    """Call each of ``works`` in a process with the resources of one of a trial's workers, and return what they return.

    One is started again where its process or node is lost. Ctrl-C and SIGTERM end all with a KeyboardInterrupt, there
    and here; so does an error of one of them.

    Args:
        works: can be sent, and so can what they return; they must bear being begun anew.
        resources: of the search.
        progress: is told here what they tell there.
        note: is told for what is waited, and how long, while no node has room for any of them.

    Raises:
        UserError: one of them raised it.
        SearchFailed: the process was lost again and again.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = _Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    own = {"num_cpus": resources.cpus_per_trial, "num_gpus": resources.gpus_per_trial}
    progress(WAITING, 0.0, "")
    allowed = allowed_modules()
    running = [_work.options(**own).remote(work, board, resources.cpus_per_trial, allowed) for work in works]
    try:
        with handling(signal.default_int_handler, signal.SIGTERM):  # as Ctrl-C; Ray would end this process at once
            left, begun, waiting = running, False, Waiting(resources, note)
            while left:
                ended, left = ray.wait(left, timeout=LOOK)
                begun = _pass_on(board, progress) or begun
                waiting.look(not begun)
                ray.get(ended)  # one that failed ends them all
            return ray.get(running)
    except BaseException as error:
        _end(running)
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            raise error.cause from None  # as if it had been raised here; Ray's own has a traceback for its text
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):
            raise SearchFailed(f"the source and its scores: {error}") from error
        raise
    finally:
        ray.kill(board)


def _end(running: Sequence[Any]) -> None:
    """Cancel what has not ended, and give it time to do so."""
    _, left = ray.wait(list(running), num_returns=len(running), timeout=0)
    for one in left:
        ray.cancel(one)
    if left:
        ray.wait(left, num_returns=len(left), timeout=END)


@ray.remote(max_retries=RESTARTS, max_calls=1)  # its process ends with it: memory is for the units that follow
def _work(work: Callable[[Progress], T], board: Any, threads: int, modules: Sequence[str]) -> T:
    torch.set_num_threads(threads)
    allow_modules(modules)
    due: dict[str, float] = {}

    def tell(what: str, share: float, note: str) -> None:
        now = time.monotonic()
        if share >= 1:
            ray.get(board.tell.remote(what, share, note))  # heard before the work ends
        elif now >= due.get(what, 0.0):
            due[what] = now + TELL
            board.tell.remote(what, share, note)

    tell(WAITING, 1.0, f"{ray.util.get_node_ip_address()}, process {os.getpid()}")
    return work(tell)


@ray.remote(num_cpus=0)
class _Board:
    """Keeps the latest report on everything that is being done, until it is read."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, str]] = {}

    def tell(self, what: str, share: float, note: str) -> None:
        self._latest[what] = (share, note)

    def take(self) -> dict[str, tuple[float, str]]:
        latest, self._latest = self._latest, {}
        return latest


def _pass_on(board: Any, progress: Progress) -> bool:
    """Tell what was reported; whether anything was."""
    found = ray.get(board.take.remote())
    for what, (share, note) in found.items():
        progress(what, share, note)
    return bool(found)
