"""SPViT: a search for a mixer of every block and hidden units of every MLP (arXiv 2111.11802)."""

from .hook import SPViT, SPViTSettings

__all__ = ["SPViT", "SPViTSettings"]
