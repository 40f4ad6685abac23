"""One file per model family, and the table of them.

``family_of(arch)`` gives the object that answers every question whose answer differs between families.
"""

from __future__ import annotations

from prunesweep.models.arch import Arch

from .base import CAPABILITIES, Family
from .checks import check_one_of
from .lm import LM
from .pvt_v2 import PVT_V2
from .swin import SWIN
from .vit import VIT

__all__ = ["CAPABILITIES", "FAMILIES", "Family", "families_with", "family_of", "register"]

FAMILIES: dict[str, Family] = {family.name: family for family in (VIT, SWIN, PVT_V2, LM)}


def family_of(arch: Arch | str) -> Family:
    """The family of a record, or of that name.

    Raises:
        UserError: there is no such family; the message lists those that there are.
    """
    name = arch.family if isinstance(arch, Arch) else arch
    check_one_of("family", name, FAMILIES)
    return FAMILIES[name]


def families_with(*capabilities: str) -> tuple[str, ...]:
    """Names of the families that have all of ``capabilities`` (names of ``CAPABILITIES``), in the table's order."""
    return tuple(name for name, family in FAMILIES.items() if family.supports(*capabilities))


def register(family: Family) -> None:
    """Add a family from outside the package, so that records may name it.

    Do it wherever its records are read: on the workers of a search too.

    Raises:
        ValueError: the name is taken, or a capability does not exist.
    """
    if FAMILIES.get(family.name, family) is not family:
        raise ValueError(f"there is a family {family.name!r} already")
    if unknown := family.capabilities - set(CAPABILITIES):
        raise ValueError(f"unknown capabilities {', '.join(sorted(unknown))}; known: {', '.join(CAPABILITIES)}")
    FAMILIES[family.name] = family
