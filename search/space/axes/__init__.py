"""The axes of a search space: one object per search variable, all in the table ``AXES``.

To add one, write a file with an ``Axis`` object (``base``) and name it in ``AXES``, or ``register`` it from outside the
package before a configuration is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunesweep.search.space.variables import Variable

from . import (
    attention_weights,
    blocks,
    budget,
    conv,
    conv3,
    depth_slope,
    distill_weight,
    embed_weight,
    embed_weights,
    halves,
    keep_rate,
    lr,
    merge_start,
    method,
    mlp_skip,
    mlp_weight,
    mlp_weights,
    qk_weight,
    skip,
)
from .base import DEPTH, LEARNED, NATURAL, POSITIVE, SHARE, TOKENS, Axis, Draft, Limits, ScoredSource
from .blocks import MIXERS

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = [
    "AXES",
    "DEPTH",
    "LEARNED",
    "MIXERS",
    "NATURAL",
    "POSITIVE",
    "SHARE",
    "TOKENS",
    "Axis",
    "Draft",
    "Limits",
    "ScoredSource",
    "active_axes",
    "register",
    "unregister",
    "variables",
]

# In this order a point's values are applied to a draft, and a search first looks along single axes.
AXES: dict[str, Axis] = {
    module.AXIS.name: module.AXIS
    for module in (
        budget,
        method,
        skip,
        conv,
        conv3,
        blocks,
        halves,
        mlp_skip,
        keep_rate,
        merge_start,
        mlp_weight,
        embed_weight,
        qk_weight,
        depth_slope,
        embed_weights,
        attention_weights,
        mlp_weights,
        lr,
        distill_weight,
    )
}


def register(axis: Axis) -> None:
    """Add an axis to ``AXES`` and its keys to ``[space]``. Raises ValueError for a name or a key that is taken."""
    from prunesweep.search.config import SpaceTable, follow_axes

    taken = {*AXES, *SpaceTable.model_fields}
    if clash := sorted(taken & {axis.name, *axis.fields()}):
        raise ValueError(f"axis {axis.name!r}: {', '.join(clash)} is taken")
    AXES[axis.name] = axis
    follow_axes()


def unregister(name: str) -> None:
    """Take an axis out of ``AXES``, and its keys out of ``[space]``."""
    from prunesweep.search.config import follow_axes

    del AXES[name]
    follow_axes()


def active_axes(table: SpaceTable) -> tuple[Axis, ...]:
    """The axes of a table's encoding."""
    return tuple(axis for axis in AXES.values() if axis.encoding in (None, table.encoding))


def variables(table: SpaceTable, source: ScoredSource) -> tuple[Variable, ...]:
    """Return every variable of a table in the order that samplers see, those that choose blocks last.

    Args:
        table: the ``[space]`` table of a configuration.
        source: the source's record and scores, which bound some ranges.

    Returns:
        Fixed variables, too.
    """
    ordered = sorted(active_axes(table), key=lambda axis: axis.of_blocks)
    return tuple(variable for axis in ordered for variable in axis.variables(table, source))
