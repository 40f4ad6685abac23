"""A factor on the saliency of the MLP units of every block."""

from __future__ import annotations

from .weights import Weights

__all__ = ["AXIS"]

AXIS = Weights(name="mlp_weights", meaning="factor on the saliency of the MLP", kinds=("mlp",))
