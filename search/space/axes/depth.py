"""What axes that count blocks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunesweep.models import Arch, UserError

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["check_depth"]


def check_depth(name: str, table: SpaceTable, arch: Arch, last: int) -> None:
    """Check that a range of blocks does not go beyond the source.

    Args:
        name: of the axis, as ``table`` has it.
        table: the ``[space]`` table of a configuration.
        arch: the source's record.
        last: the largest value that is allowed.

    Raises:
        UserError: the range ``name`` of ``table`` goes beyond ``last``.
    """
    if getattr(table, name)[1] > last:
        raise UserError(
            f"space.{name} = {list(getattr(table, name))}: the source has {arch.depth} blocks, so it must not "
            f"exceed {last}"
        )
