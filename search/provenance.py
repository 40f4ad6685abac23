"""Names for things that took long to make: hashes of content, and versions of what made them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

__all__ = ["digest", "versions", "weights_digest"]


def digest(facts: Mapping[str, Any]) -> str:
    """16 hex digits of JSON-ready facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of a model's state dict, names and bytes."""
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def versions() -> dict[str, str]:
    """What a result was made with."""
    packages = {name: version(name) for name in ("prunesweep", "torch", "timm", "optuna", "ray")}
    return {"python": platform.python_version(), **packages}
