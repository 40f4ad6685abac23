"""Data, losses and the one training loop."""

from .checkpoint import load_state, save_state
from .data import Data, DataInfo, images_only, open_data
from .evaluate import EVAL_BATCH, evaluate
from .loop import Epoch, fit, seeded
from .recipe import Recipe

__all__ = [
    "EVAL_BATCH",
    "Data",
    "DataInfo",
    "Epoch",
    "Recipe",
    "evaluate",
    "fit",
    "images_only",
    "load_state",
    "open_data",
    "save_state",
    "seeded",
]
