"""A factor on the saliency of the residual channels of every stage."""

from __future__ import annotations

from .weights import Weights

__all__ = ["AXIS"]

AXIS = Weights(
    name="embed_weights", meaning="factor on the saliency of the residual channels", place="stages", kinds=("embed",)
)
