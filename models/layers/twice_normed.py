"""Gated MLPs that begin with a norm of their own, behind the one that stands in front of them, as ViTamin's do.

Source: arXiv 2404.02132.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GluMlp

__all__ = ["TwiceNormedGluMlp"]


class TwiceNormedGluMlp(GluMlp):  # type: ignore[misc]  # timm is untyped
    """timm's GluMlp behind ``entry_norm``, a norm over the D channels that it reads."""

    def __init__(self, in_features: int, hidden_features: int, *, entry_norm: Any, **options: Any) -> None:
        super().__init__(in_features, hidden_features, **options)
        self.entry_norm = entry_norm(in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (B, N, D) from (B, N, D)."""
        found: torch.Tensor = super().forward(self.entry_norm(x))
        return found
