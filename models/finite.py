"""Weights that are no numbers: refused before any work is put into them."""

from __future__ import annotations

import torch
from torch import nn

from .errors import UserError

__all__ = ["check_finite", "not_finite"]


def not_finite(model: nn.Module) -> str | None:
    """Describe which weights and buffers of a model are NaN or infinite: the first tensor by name; None if none is."""
    found = {
        name: int((~torch.isfinite(tensor)).sum()) for name, tensor in model.state_dict().items() if tensor.numel()
    }
    broken = {name: count for name, count in found.items() if count}
    if not broken:
        return None
    name, count = next(iter(broken.items()))
    more = f", and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
    return (
        f"{name} has {count:,} values that are NaN or infinite{more}. Its training diverged or its file is damaged; "
        "take an earlier checkpoint"
    )


def check_finite(model: nn.Module, what: str = "the model") -> None:
    """Check that all weights and buffers of a model are finite.

    Args:
        model: the model.
        what: what it is called in the message, such as the name that the user gave.

    Raises:
        UserError: a tensor has NaN or infinite values; the message names the first one and counts all.
    """
    if found := not_finite(model):
        raise UserError(f"{what}: {found}")
