"""UP-ViT: the change of the output distribution when a unit is removed (arXiv 2111.15127)."""

from .importance import FAMILIES, IMPORTANCES, KINDS, SKIP, merge, score, score_blocks, score_depth

__all__ = ["FAMILIES", "IMPORTANCES", "KINDS", "SKIP", "merge", "score", "score_blocks", "score_depth"]
