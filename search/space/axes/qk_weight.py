"""A factor on the saliency of query/key channels, beside which those of values have none."""

from __future__ import annotations

from .weight import Weight

__all__ = ["AXIS"]

AXIS = Weight(name="qk_weight", meaning="factor on the saliency of query/key channels (log scale)", kind="qk")
