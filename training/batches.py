"""Choose the images that a worker sees at every update, from seed and epoch alone, for any number of workers."""

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
    ``repeats``, an epoch of the same length has fewer images, each in several places next to each other, which then go
    to different workers ("repeated augmentation", Hoffer et al. 2020, arXiv 1901.09335). The last images, which fill no
    batch, are left out.

    Call ``start`` before iterating over an epoch.

    Args:
        images: number of training images.
        batch_size: images per update, over all workers and pieces.
        world: this worker among all workers.
        accumulate: pieces per batch and worker.
        repeats: places that an image has in an epoch.
        only: indices of the images that are trained on, as many as ``images``; all of them by default.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        world: World,
        *,
        accumulate: int = 1,
        repeats: int = 1,
        only: torch.Tensor | None = None,
    ) -> None:
        self.images, self.batch_size, self.world = images, batch_size, world
        self.accumulate, self.repeats, self.only = accumulate, repeats, only
        self.generator = torch.Generator()

    @property
    def updates(self) -> int:
        """Number of batches in an epoch."""
        return self.images // self.batch_size

    def start(self, seed: int) -> None:
        """Seed the order of the next iteration."""
        self.generator.manual_seed(seed)

    def __len__(self) -> int:
        return self.updates * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.images, generator=self.generator)
        order = order if self.only is None else self.only[order]
        order = order.repeat_interleave(self.repeats)[: self.updates * self.batch_size]
        for batch in order.view(self.updates, self.batch_size):
            own = batch[self.world.rank :: self.world.size]
            for piece in own.chunk(self.accumulate):
                yield piece.tolist()


def own_share(images: int, world: World) -> list[int]:
    """Return the indices of this worker's images; all workers together have each image once, without padding.

    Args:
        images: number of images.
        world: this worker among all workers.
    """
    return list(range(world.rank, images, world.size))


class WithRows(Dataset[Any]):
    """Add the rows of tables to a data set: an item is (image, label, rows by the tables' names).

    Args:
        data: map-style data set of (image, label).
        known: tables by name, each with a row per image index.
    """

    def __init__(self, data: Dataset[Any], known: Mapping[str, Any]) -> None:
        self.data, self.known = data, known

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        image, label = self.data[index]
        return image, label, {name: rows[index] for name, rows in self.known.items()}
