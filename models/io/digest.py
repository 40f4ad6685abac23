"""A digest that identifies a model's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["weights_digest"]


def weights_digest(model: nn.Module) -> str:
    """Return 16 hex digits that identify a model's weights.

    They are a hash of the state dict's names, shapes, dtypes and bytes.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]
