"""A loader whose worker processes persist over epochs and draw the random numbers that new workers would draw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils.worker import _generate_state

__all__ = ["PersistentLoader"]


class PersistentLoader(DataLoader[Any]):
    """A loader with ``persistent_workers`` that seeds its workers anew for every epoch.

    Torch seeds workers once, when they start. With persistent workers, an epoch after a resume would then be augmented
    differently from the same epoch of an uninterrupted run. Here every epoch draws a seed from the default generator,
    as torch does for new workers, and sends it to the workers with the indices.
    """

    _batches: _WithSeed

    @classmethod
    def make(
        cls, data: Dataset[Any], batches: Any, *, workers: int, pin_memory: bool, collate: Any = None
    ) -> DataLoader[Any]:
        """Make a loader of ``batches``: a persistent one, or a plain one without worker processes.

        Args:
            data: map-style data set.
            batches: iterable of lists of indices, with a length.
            workers: number of worker processes; 0 loads in this process.
            pin_memory: as for torch's ``DataLoader``.
            collate: its ``collate_fn``, a function of a module.
        """
        if workers == 0:
            return DataLoader(data, batch_sampler=batches, pin_memory=pin_memory, collate_fn=collate)
        seeded = _WithSeed(batches)
        loader = cls(
            _Seeding(data),
            batch_sampler=seeded,
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=collate,
            persistent_workers=True,
            generator=torch.Generator(),  # torch's own draw must not touch the default generator
        )
        loader._batches = seeded
        return loader

    def __iter__(self) -> Any:
        self._batches.seed = int(torch.empty((), dtype=torch.int64).random_().item())
        return super().__iter__()


class _WithSeed:
    """Batches of (seed of the epoch, index) pairs."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.seed = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed = self.seed
        for indices in self.batches:
            yield [(seed, index) for index in indices]


class _Seeding(Dataset[Any]):
    """A data set that seeds its process, as torch's worker loop does, whenever another epoch begins."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data
        self._seed: int | None = None

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        seed, index = key
        worker = get_worker_info()
        if worker is not None and seed != self._seed:
            self._seed = seed
            random.seed(seed + worker.id)
            torch.manual_seed(seed + worker.id)
            np.random.seed(_generate_state(seed, worker.id))  # type: ignore[no-untyped-call]
        return self.data[index]
