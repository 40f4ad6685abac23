"""Whether an error means that there is too little memory, whoever raises it."""

from __future__ import annotations

import torch

__all__ = ["out_of_memory"]

# of torch's allocator for CPUs, which has no error type of its own
SAID = ("can't allocate memory: you tried to allocate", "not enough memory: you tried to allocate")


def out_of_memory(error: BaseException) -> bool:
    """Say whether memory has run out by an error: a GPU's, or this process's own, as below a limit (``ulimit -v``)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SAID)
