"""Working in float32 with models whose weights are stored in another type, float16, bfloat16 or float64.

Images are float32, and scores, closed forms and training need its digits. So a model is cast where it is used, and
remembers its type: what is made of it is saved in that type again (``models.save``).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

__all__ = [
    "HALF",
    "TYPES",
    "as_stored",
    "dtype_in",
    "in_float32",
    "keep_dtype",
    "narrowed",
    "stored_dtype",
    "to_float32",
    "widened",
]

HALF = (torch.float16, torch.bfloat16)
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}  # by safetensors


def stored_dtype(model: nn.Module) -> torch.dtype:
    """Return the type that a model's weights are saved in: that from before ``to_float32``, or the one they have."""
    own = _own(model)
    kept: torch.dtype | None = getattr(model, "stored_dtype", None)  # type: ignore[assignment]  # no tensor
    return own if kept is None or own != torch.float32 else kept


def _own(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def to_float32(model: nn.Module) -> Any:
    """Cast a model to float32 in place, remember the type that it had, and return it."""
    if _own(model) != torch.float32:
        model.stored_dtype = _own(model)  # type: ignore[assignment]  # nn.Module types attributes as Tensor | Module
    return model.float()


def in_float32(model: nn.Module) -> Any:
    """Return a model itself where its weights are float32, otherwise a copy as of ``to_float32``."""
    known = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    return model if known else to_float32(copy.deepcopy(model))


def widened(model: nn.Module) -> Any:
    """Return a model itself, or a copy in float32 of one in half precision, whose sums would lose too many digits."""
    return in_float32(model) if _own(model) in HALF else model


def narrowed(made: nn.Module, model: nn.Module) -> Any:
    """Cast what was made of ``widened(model)`` to the type of ``model``, in place, and return it."""
    keep_dtype(made, model)
    return made.to(_own(model))


def keep_dtype(made: nn.Module, source: nn.Module) -> None:
    """Let a model that was made of one that ``to_float32`` has cast be saved in that one's type."""
    if stored_dtype(source) != _own(source):
        made.stored_dtype = stored_dtype(source)  # type: ignore[assignment]  # as above


@torch.no_grad()
def as_stored(model: nn.Module) -> bool:
    """Round the weights in place to what their file will hold, so that what is measured is what is saved.

    Returns:
        Whether the file has fewer digits than the weights.
    """
    dtype = stored_dtype(model)
    rounds = dtype in HALF and dtype != next(model.parameters()).dtype
    for tensor in model.state_dict().values() if rounds else ():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return rounds


def dtype_in(file: Path) -> torch.dtype:
    """Return the type of the weights in a safetensors file; float32 if there are none, or it is no such file."""
    try:
        with safe_open(file, "pt") as tensors:
            kinds = (tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118 (safe_open is no dict)
            return next((TYPES[kind] for kind in kinds if kind in TYPES), torch.float32)
    except (SafetensorError, OSError):
        return torch.float32
