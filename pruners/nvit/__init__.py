"""NViT: one-shot saliency, and iterative pruning while a model trains (arXiv 2110.04869)."""

from .saliency import FAMILIES, KINDS, divisors, raw_saliency, score

__all__ = ["FAMILIES", "KINDS", "divisors", "raw_saliency", "score"]
