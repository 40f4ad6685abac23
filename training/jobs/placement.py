"""Where training runs, and how many workers it has."""

from __future__ import annotations

from dataclasses import dataclass

from prunesweep.models import UserError

__all__ = ["Placement", "worker_range"]


@dataclass(frozen=True)
class Placement:
    """Training in this process, or on Ray Train's workers where their number or an address is given.

    With ``min_workers``, training goes on with that many where a node is lost, and with more again, up to ``workers``,
    once there is room for them (Ray looks every minute); each change restarts the workers from the last checkpoint, and
    the batches stay the same.

    Args:
        workers: processes that train together; each takes its share of every batch.
        min_workers: the least of them to go on with; all of them by default.
        cpus, gpus: of each worker.
        address: of a running Ray cluster, all of whose nodes see the job's folders; by default a Ray of its own, or the
            one that this process has joined already.
        storage: path or URI that all nodes can write to, where checkpoints stay; by default beside the result, until
            training is done.
    """

    workers: int = 1
    min_workers: int | None = None
    cpus: int = 1
    gpus: float = 0
    address: str | None = None
    storage: str | None = None

    @property
    def here(self) -> bool:
        """Whether training runs in this process, without Ray."""
        return self.workers == 1 and self.min_workers is None and self.address is None


def worker_range(given: str) -> tuple[int, int]:
    """Read the least and the most workers of ``N`` or ``MIN-MAX``. Raises UserError for anything else."""
    low, dash, high = given.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash) and 1 <= int(low) <= int(high or low)):
        raise UserError(f"--workers {given}: must be a number from 1 on, or a range such as 2-4")
    return int(low), int(high or low)
