"""A factor on the saliency of channels of the residual stream, of all stages."""

from __future__ import annotations

from .weight import Weight

__all__ = ["AXIS"]

AXIS = Weight(name="embed_weight", meaning="factor on the saliency of residual channels (log scale)", kind="embed")
