"""Weights that are no numbers: refused before any work is put into them."""

from __future__ import annotations

import torch
from torch import nn

from .errors import UserError

__all__ = ["check_finite"]


def check_finite(model: nn.Module, what: str = "the model") -> None:
    """Check that all weights and buffers of a model are finite.

    Args:
        model: the model.
        what: what it is called in the message, such as the name that the user gave.

    Raises:
        UserError: a tensor has NaN or infinite values; the message names the first one and counts all.
    """
    found = {
        name: int((~torch.isfinite(tensor)).sum()) for name, tensor in model.state_dict().items() if tensor.numel()
    }
    broken = {name: count for name, count in found.items() if count}
    if broken:
        name, count = next(iter(broken.items()))
        more = f", and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise UserError(
            f"{what}: {name} has {count:,} values that are NaN or infinite{more}. Its training diverged or its file is "
            "damaged; take an earlier checkpoint"
        )
