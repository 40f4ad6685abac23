"""Where training runs, and on how many workers."""

from __future__ import annotations

from dataclasses import dataclass

from prunesweep.models import UserError

__all__ = ["Placement", "worker_range"]


@dataclass(frozen=True)
class Placement:
    """Where training runs: in this process, or on Ray Train's workers if their number or an address is given.

    With ``min_workers``, training goes on with that many workers after a node is lost, and with more again, up to
    ``workers``, once there is room for them (Ray looks every minute). Each change restarts the workers from the last
    checkpoint, and the batches stay the same.

    Args:
        workers: processes that train together; each takes its share of every batch.
        min_workers: the smallest number of workers to go on with; ``workers`` by default.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.
        address: address of a running Ray cluster, all of whose nodes see the job's folders. By default a Ray of its own
            is started, or the one that this process has joined already is used.
        storage: path or URI that all nodes can write to, where checkpoints stay; by default they lie beside the result
            until training is done.
    """

    workers: int = 1
    min_workers: int | None = None
    cpus: int = 1
    gpus: float = 0
    address: str | None = None
    storage: str | None = None

    @property
    def here(self) -> bool:
        """True if training runs in this process, without Ray."""
        return self.workers == 1 and self.min_workers is None and self.address is None


def worker_range(given: str) -> tuple[int, int]:
    """Parse ``N`` or ``MIN-MAX`` to the smallest and the largest number of workers.

    Raises:
        UserError: ``given`` is neither.
    """
    low, dash, high = given.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash) and 1 <= int(low) <= int(high or low)):
        raise UserError(f"--workers {given}: must be a number from 1 on, or a range such as 2-4")
    return int(low), int(high or low)
