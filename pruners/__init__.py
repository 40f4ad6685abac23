"""How a decision is made: scores of a model's prunable groups, and cuts that meet a budget.

``PRUNERS`` is the one table of width methods.
"""

from prunesweep.pruners.upvit.importance import merge, score_blocks, score_depth
from prunesweep.pruners.upvit.rules import Target, select

from .budget import GROUP_SIZES, MACS, PARAMS, Measure, WidthPath, drop_order, latency, width_path
from .divergence import kl_divergence
from .registry import PRUNERS, Pruner, cheapest_first, pruner
from .scores import KINDS, Scores, kind_of, unit_counts, vector_sizes

__all__ = [
    "GROUP_SIZES",
    "KINDS",
    "MACS",
    "PARAMS",
    "PRUNERS",
    "Measure",
    "Pruner",
    "Scores",
    "Target",
    "WidthPath",
    "cheapest_first",
    "drop_order",
    "kind_of",
    "kl_divergence",
    "latency",
    "merge",
    "pruner",
    "score_blocks",
    "score_depth",
    "select",
    "unit_counts",
    "vector_sizes",
    "width_path",
]
