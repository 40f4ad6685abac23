"""Data, recipes, losses and the one training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chance import chance_warning, warn_at_chance
    from .checkpoint import load_state, save_state
    from .closest import Kept
    from .compatibility import check_features, check_fits, check_labels, check_order, open_fitting
    from .data import Data, DataInfo, absolute_name, check_words, images_only, open_data, open_text, own_data
    from .evaluation import (
        EVAL_BATCH,
        Compared,
        evaluate,
        evaluate_all,
        evaluate_on,
    )
    from .loop import Diverged, Epoch, fit, name_classes, seeded
    from .metrics import EvalMetrics, quality_name
    from .own_measure import own_quality
    from .quality import Quality, try_quality
    from .recipe import Distill, Recipe, load_recipe, recipe_names
    from .teacher_cache import cache_logits
    from .trainer import DoesNotFit, batches_of
    from .world import World
else:
    from prunesweep.models.lazy import look_up

    __getattr__ = look_up(
        __name__,
        {
            "chance": ("chance_warning", "warn_at_chance"),
            "checkpoint": ("load_state", "save_state"),
            "closest": ("Kept",),
            "compatibility": ("check_features", "check_fits", "check_labels", "check_order", "open_fitting"),
            "data": (
                "Data",
                "DataInfo",
                "absolute_name",
                "check_words",
                "images_only",
                "open_data",
                "open_text",
                "own_data",
            ),
            "evaluation": ("EVAL_BATCH", "Compared", "evaluate", "evaluate_all", "evaluate_on"),
            "loop": ("Diverged", "Epoch", "fit", "name_classes", "seeded"),
            "metrics": ("EvalMetrics", "quality_name"),
            "own_measure": ("own_quality",),
            "quality": ("Quality", "try_quality"),
            "recipe": ("Distill", "Recipe", "load_recipe", "recipe_names"),
            "teacher_cache": ("cache_logits",),
            "trainer": ("DoesNotFit", "batches_of"),
            "world": ("World",),
        },
    )

__all__ = [
    "EVAL_BATCH",
    "Compared",
    "Data",
    "DataInfo",
    "Distill",
    "Diverged",
    "DoesNotFit",
    "Epoch",
    "EvalMetrics",
    "Kept",
    "Quality",
    "Recipe",
    "World",
    "absolute_name",
    "batches_of",
    "cache_logits",
    "chance_warning",
    "check_features",
    "check_fits",
    "check_labels",
    "check_order",
    "check_words",
    "evaluate",
    "evaluate_all",
    "evaluate_on",
    "fit",
    "images_only",
    "load_recipe",
    "load_state",
    "name_classes",
    "open_data",
    "open_fitting",
    "open_text",
    "own_data",
    "own_quality",
    "quality_name",
    "recipe_names",
    "save_state",
    "seeded",
    "try_quality",
    "warn_at_chance",
]
