"""The one table of pruners, and what each of them is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models import Arch, UserError
from models.errors import nearest

from . import nvit
from .scores import Scores

__all__ = ["PRUNERS", "Pruner", "pruner"]


@dataclass(frozen=True)
class Pruner:
    """A width method.

    ``score(model, batches, *, progress=None, **settings)`` takes (images B·C·H·W, labels B) batches and returns scores
    of ``kinds``. ``families`` are those that it can serve.
    """

    score: Callable[..., Scores]
    kinds: tuple[str, ...]
    families: tuple[str, ...]
    source: str  # the publication

    def check(self, name: str, arch: Arch) -> None:
        """Raise UserError where this method cannot serve the family of ``arch``."""
        if arch.family not in self.families:
            able = ", ".join(n for n, p in PRUNERS.items() if arch.family in p.families)
            raise UserError(
                f"method {name!r} serves families {', '.join(self.families)}; {arch.source} is a {arch.family!r}, "
                f"for which there are: {able or 'none'}"
            )


PRUNERS: dict[str, Pruner] = {
    "nvit": Pruner(nvit.score, nvit.KINDS, nvit.FAMILIES, "NViT, CVPR 2023, arXiv 2110.04869"),
}


def pruner(name: str) -> Pruner:
    """The pruner of this name. Raises UserError for an unknown one."""
    if name not in PRUNERS:
        raise UserError(f"unknown method {name!r}; known: {', '.join(PRUNERS)}. {nearest(name, PRUNERS)}".strip())
    return PRUNERS[name]
