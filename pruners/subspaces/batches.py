"""Tensors of all calibration images, batch by batch: in memory while they are few, in a temporary file beyond that."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple, overload

import torch

__all__ = ["Batches"]


class _Written(NamedTuple):
    """Where a tensor lies in a file. No tensor of its own: one in place of what was freed would break up the heap."""

    file: IO[bytes]
    begin: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def read(self) -> torch.Tensor:
        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        self.file.seek(self.begin)
        self.file.readinto(flat.numpy())  # type: ignore[attr-defined]
        return flat.view(self.dtype).view(self.shape).to(self.device)


class Batches(Sequence[torch.Tensor]):
    """A sequence of tensors that takes a bounded part of the memory.

    What is beyond the limit is written to a file without a name, in the folder that ``TMPDIR`` names. The file is gone
    when nothing needs it any more, or when the process ends, however it ends.

    Args:
        tensors: one per batch; taken one after the other, so they may be computed as they are asked for.
        limit: bytes that stay in memory; ``IN_MEMORY`` by default.
    """

    IN_MEMORY = 32 * 2**20

    def __init__(self, tensors: Iterable[torch.Tensor] = (), limit: int | None = None) -> None:
        self._items: list[torch.Tensor | _Written] = []
        self._file: IO[bytes] | None = None
        self.limit, self.in_memory = self.IN_MEMORY if limit is None else limit, 0
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: torch.Tensor) -> None:
        """Put a tensor behind the others."""
        if self._file is None and self.in_memory + tensor.nbytes <= self.limit:
            self.in_memory += tensor.nbytes
            self._items.append(tensor)
            return
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 (as long as a tensor lies in it)
        begin = self._file.seek(0, os.SEEK_END)
        flat = tensor.detach().cpu().contiguous().flatten()
        self._file.write(flat.view(torch.uint8).numpy().data)
        self._items.append(_Written(self._file, begin, tensor.nbytes, tuple(tensor.shape), tensor.dtype, tensor.device))

    @property
    def lengths(self) -> list[int]:
        """Length of every tensor along its first axis."""
        return [item.shape[0] for item in self._items]

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Batches:
        if isinstance(index, slice):
            return self._of(self._items[index])
        item = self._items[index]
        return item.read() if isinstance(item, _Written) else item

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[n] for n in range(len(self)))

    def __add__(self, other: Batches) -> Batches:
        return self._of([*self._items, *other._items])

    @staticmethod
    def _of(items: list[Any]) -> Batches:
        found = Batches()
        found._items = items
        return found
