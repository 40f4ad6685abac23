"""Subspaces: small models computed in closed form from a source and unlabelled images.

Where a width carries no nonlinearity (residual stream, queries and keys, values) the small model is projected onto the
best subspace; then every layer that reads or writes is refitted by ridge regression, block after block.
"""

from .compression import compress
from .front import Point, instant
from .normal_equations import Moments, NormalEquations
from .projection import projectable, projected_groups, projected_widths
from .recovery import recover
from .scoring import score
from .source import SourceStatistics
from .streams import SourceStreams
from .support import can_recover
from .units import rank_units, unit_moments, units_by
from .widths import BlockWidths, Widths, compressed_arch, equal_shares

__all__ = [
    "BlockWidths",
    "Moments",
    "NormalEquations",
    "Point",
    "SourceStatistics",
    "SourceStreams",
    "Widths",
    "can_recover",
    "compress",
    "compressed_arch",
    "equal_shares",
    "instant",
    "projectable",
    "projected_groups",
    "projected_widths",
    "rank_units",
    "recover",
    "score",
    "unit_moments",
    "units_by",
]
