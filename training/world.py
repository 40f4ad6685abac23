"""The workers of a training run: how many there are, which one this process is, and what they exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """Worker number ``rank`` of ``size`` workers of one training run; by default the only one."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """Return this worker of the initialised process group (Ray Train's or torchrun's), or a single worker."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """True for the worker that writes what is written once."""
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
            values = tensor.contiguous()  # the tensor may have any memory format
            dist.broadcast(values, src=0)
            tensor.copy_(values)
