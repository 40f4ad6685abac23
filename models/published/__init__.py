"""Published compressed transformers: their records, what papers print about them, and what they cost exactly."""

from .comparison import PUBLISHED, Comparison, Published, Speed, compare, published_arch, revit

__all__ = ["PUBLISHED", "Comparison", "Published", "Speed", "compare", "published_arch", "revit"]
