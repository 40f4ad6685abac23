"""How a decision is made: scores of a model's prunable groups, and cuts that meet a budget.

``PRUNERS`` is the one table of width methods: name -> function (model, batches) -> Scores.
"""

from collections.abc import Callable

from . import nvit
from .budget import GROUP_SIZES, WidthPath, drop_order, width_path
from .depth import kl_divergence, score_depth
from .scores import KINDS, Scores, vector_sizes

PRUNERS: dict[str, Callable[..., Scores]] = {"nvit": nvit.score}

__all__ = [
    "GROUP_SIZES",
    "KINDS",
    "PRUNERS",
    "Scores",
    "WidthPath",
    "drop_order",
    "kl_divergence",
    "score_depth",
    "vector_sizes",
    "width_path",
]
