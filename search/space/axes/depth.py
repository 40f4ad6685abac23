"""What axes check of the source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunesweep.models import Arch, UserError
from prunesweep.models.families import family_of

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["check_depth", "check_family"]


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


def check_family(name: str, table: SpaceTable, arch: Arch, capability: str, without: float) -> None:
    """Check that the source's family can have what a range asks for; else no candidate with it could be built.

    Args:
        name: of the axis, as ``table`` has it.
        table: the ``[space]`` table of a configuration.
        arch: the source's record.
        capability: what the family must have, of ``models.families.CAPABILITIES``.
        without: the value of the axis that needs no such thing.

    Raises:
        UserError: the range ``name`` of ``table`` has other values, and the family lacks the capability.
    """
    given, family = list(getattr(table, name)), family_of(arch)
    if given == [without, without] or family.supports(capability):
        return
    reason = f": {family.lacks[capability]}" if capability in family.lacks else ""
    raise UserError(
        f"space.{name} = {given}: {arch.source} is of family {arch.family!r}, which lacks {capability!r}{reason}; set "
        f"it to [{without:g}, {without:g}]"
    )
