"""Which of timm's pretrained models a record can express, and why it cannot express the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import timm
from timm.models import model_entrypoint

from .arch import Arch
from .errors import UserError
from .families import FAMILIES
from .without_values import without_values

__all__ = ["Verdict", "verdicts"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a name of timm's is here: of a family, or refused for a reason."""

    name: str
    kind: str  # timm's class
    family: str | None = None
    reason: str | None = None


def verdicts(names: Iterable[str] | None = None) -> list[Verdict]:
    """Look at timm's names one by one; weights are neither fetched nor made.

    Names that differ in their weights alone (behind the point) are one architecture, which is looked at once; classes
    that no family reads are not even built.

    Args:
        names: those to look at; all that timm has pretrained weights for by default.
    """
    found = []
    for name in timm.list_models(pretrained=True) if names is None else names:
        kind, family, reason = _verdict(name.split(".")[0], tuple(FAMILIES))
        found.append(Verdict(name, kind, family, reason))
    return found


@cache
def _verdict(architecture: str, families: tuple[str, ...]) -> tuple[str, str | None, str | None]:
    """Return class, family and reason of an architecture; ``families`` are those that are known at the time."""
    known = {kind.__name__ for name in families for kind in FAMILIES[name].timm_classes}
    promised = model_entrypoint(architecture).__annotations__.get("return")
    kind = str(getattr(promised, "__name__", promised) or "")
    if kind and kind not in known:
        return kind, None, f"is a {kind}"
    with without_values(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a model that takes images of any size
        model = timm.create_model(architecture)
        kind = type(model).__name__
        if kind not in known:
            return kind, None, f"is a {kind}"
        try:
            return kind, Arch.from_timm(model).family, None
        except UserError as error:
            return kind, None, str(error).rpartition(" cannot be represented: ")[2]
