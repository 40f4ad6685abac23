"""Pruning methods: scores of a model's prunable groups, and cuts that meet a budget.

``METHODS`` is the one table of methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunesweep.pruners.upvit.importance import merge, score_blocks, score_depth
    from prunesweep.pruners.upvit.rules import Target, select

    from .budget import GROUP_SIZES, MACS, PARAMS, Measure, WidthPath, drop_order, latency, width_path
    from .divergence import FeatureQuality, feature_quality, kl_divergence
    from .method import AppliedMethod, Method, ScoredMethod, TokenMethod, TrainedMethod, WidthMethod, cheapest_first
    from .methods import METHODS, get_method, method_names, register
    from .reached import TOLERANCE, Reached, meets, spent, suggestion
    from .scores import KINDS, Scores, kind_of, unit_counts, vector_sizes
else:
    from prunesweep.models.lazy import look_up

    __getattr__ = look_up(
        __name__,
        {
            "upvit.importance": ("merge", "score_blocks", "score_depth"),
            "upvit.rules": ("Target", "select"),
            "budget": ("GROUP_SIZES", "MACS", "PARAMS", "Measure", "WidthPath", "drop_order", "latency", "width_path"),
            "divergence": ("FeatureQuality", "feature_quality", "kl_divergence"),
            "method": (
                "AppliedMethod",
                "Method",
                "ScoredMethod",
                "TokenMethod",
                "TrainedMethod",
                "WidthMethod",
                "cheapest_first",
            ),
            "methods": ("METHODS", "get_method", "method_names", "register"),
            "reached": ("TOLERANCE", "Reached", "meets", "spent", "suggestion"),
            "scores": ("KINDS", "Scores", "kind_of", "unit_counts", "vector_sizes"),
        },
    )

__all__ = [
    "GROUP_SIZES",
    "KINDS",
    "MACS",
    "METHODS",
    "PARAMS",
    "TOLERANCE",
    "AppliedMethod",
    "FeatureQuality",
    "Measure",
    "Method",
    "Reached",
    "ScoredMethod",
    "Scores",
    "Target",
    "TokenMethod",
    "TrainedMethod",
    "WidthMethod",
    "WidthPath",
    "cheapest_first",
    "drop_order",
    "feature_quality",
    "get_method",
    "kind_of",
    "kl_divergence",
    "latency",
    "meets",
    "merge",
    "method_names",
    "register",
    "score_blocks",
    "score_depth",
    "select",
    "spent",
    "suggestion",
    "unit_counts",
    "vector_sizes",
    "width_path",
]
