"""A factor on the saliency of MLP units."""

from __future__ import annotations

from .weight import Weight

__all__ = ["AXIS"]

AXIS = Weight(name="mlp_weight", meaning="factor on the saliency of MLP units (log scale)", kind="mlp")
