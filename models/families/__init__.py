"""One file per model family, and the table of them.

``family_of(arch)`` gives the object that answers every question whose answer differs between families.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

from prunesweep.models.arch import Arch

from .base import CAPABILITIES, Family
from .beit import BEIT
from .cait import CAIT
from .checks import check_one_of
from .diff import DIFF
from .eva import EVA
from .hiera import HIERA
from .lm import LM
from .metaformer import METAFORMER
from .pit import PIT
from .pvt_v2 import PVT_V2
from .sam import SAM
from .swin import SWIN
from .swin_v2 import SWIN_V2
from .vit import VIT
from .xcit import XCIT

__all__ = ["CAPABILITIES", "FAMILIES", "FamiliesWith", "Family", "families_with", "family_of", "register"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (VIT, EVA, BEIT, DIFF, CAIT, XCIT, SWIN, SWIN_V2, HIERA, SAM, PVT_V2, PIT, METAFORMER, LM)
}


def family_of(arch: Arch | str) -> Family:
    """Return the family of a record, or of that name.

    Raises:
        UserError: there is no such family; the message lists those that there are.
    """
    name = arch.family if isinstance(arch, Arch) else arch
    if name not in FAMILIES:
        check_one_of("family", name, FAMILIES)
    return FAMILIES[name]


def names_with(*capabilities: str) -> str:
    """Word ``families_with`` for an error message: ``family 'vit'``, or ``families 'vit', 'swin'``."""
    names = families_with(*capabilities)
    return f"{'family' if len(names) == 1 else 'families'} {', '.join(map(repr, names))}"


def families_with(*capabilities: str) -> tuple[str, ...]:
    """List the families that have all of ``capabilities`` (names of ``CAPABILITIES``), in the table's order."""
    return tuple(name for name, family in FAMILIES.items() if family.supports(*capabilities))


class FamiliesWith(Collection[str]):
    """The names of the families that a method can serve, selected by the capabilities that it needs.

    They are looked up at every use, so that families added later are among them.

    Args:
        capabilities: names of ``CAPABILITIES``, all of which a family must have.
        without: those of which it must have none, each with what keeps the method from them.

    Raises:
        KeyError: there is no such capability.
    """

    def __init__(self, *capabilities: str, without: Mapping[str, str] = MappingProxyType({})) -> None:
        self.capabilities, self.without = capabilities, dict(without)
        families_with(*capabilities, *without)

    def why_not(self, name: str) -> str | None:
        """Say which capability keeps a family out, and why; None for one that is served.

        Args:
            name: of the family.
        """
        family = family_of(name)
        for own in self.capabilities:
            if not family.supports(own):
                return f"it lacks {own!r}: {family.lacks.get(own, 'see CONTRIBUTING for what that is')}"
        for own, reason in self.without.items():
            if family.supports(own):
                return f"it has {own!r}: {reason}"
        return None

    def _names(self) -> tuple[str, ...]:
        ruled_out = {name for own in self.without for name in families_with(own)}
        return tuple(name for name in families_with(*self.capabilities) if name not in ruled_out)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


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
