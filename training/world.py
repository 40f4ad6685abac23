"""Which of how many workers this process is; one worker where nothing was started."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` workers of one training run, each with a share of every batch."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The initialised process group (Ray Train's or torchrun's), or one worker."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``values`` over all workers, on every one of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite ``tensor`` on every worker with the first one's, in place."""
        if self.size > 1:
            values = tensor.contiguous()  # of any memory format before
            dist.broadcast(values, src=0)
            tensor.copy_(values)
