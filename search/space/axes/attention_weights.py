"""A factor on the saliency of the attention of every block: its heads, queries, keys and values."""

from __future__ import annotations

from .halves import ATTENTION
from .weights import Weights

__all__ = ["AXIS"]

AXIS = Weights(
    name="attention_weights",
    meaning="factor on the saliency of the attention",
    kinds=ATTENTION,
)
