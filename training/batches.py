"""Which images a worker sees at every update: a function of seed and epoch, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from .world import World

__all__ = ["EpochBatches", "WithRows", "own_share"]


class EpochBatches(Sampler[list[int]]):
    """Index lists of this worker's part of every batch of an epoch, in ``accumulate`` pieces each.

    The images of batch i are the same for any number of workers, so that two workers compute what one would. With
    ``repeats``, an epoch of the same length has fewer images, each in several places next to each other, which then
    go to different workers ("repeated augmentation"). The last images that fill no batch are left out.

    ``start`` an epoch before iterating over it.
    """

    def __init__(self, images: int, batch_size: int, world: World, *, accumulate: int = 1, repeats: int = 1) -> None:
        self.images, self.batch_size, self.world = images, batch_size, world
        self.accumulate, self.repeats = accumulate, repeats
        self.generator = torch.Generator()

    @property
    def updates(self) -> int:
        """Batches of an epoch."""
        return self.images // self.batch_size

    def start(self, seed: int) -> None:
        """Let the next iteration draw its order from ``seed``."""
        self.generator.manual_seed(seed)

    def __len__(self) -> int:
        return self.updates * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.images, generator=self.generator)
        order = order.repeat_interleave(self.repeats)[: self.updates * self.batch_size]
        for batch in order.view(self.updates, self.batch_size):
            own = batch[self.world.rank :: self.world.size]
            for piece in own.chunk(self.accumulate):
                yield piece.tolist()


def own_share(images: int, world: World) -> list[int]:
    """Every ``size``-th image from ``rank`` on: over all workers each image once, without padding."""
    return list(range(world.rank, images, world.size))


class WithRows(Dataset[Any]):
    """Images, labels, and the rows that tables have for each image by its index, by the tables' names."""

    def __init__(self, data: Dataset[Any], known: Mapping[str, Any]) -> None:
        self.data, self.known = data, known

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        image, label = self.data[index]
        return image, label, {name: rows[index] for name, rows in self.known.items()}
