"""The one table of pruners, and what each of them is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from prunesweep.models import Arch, Cut, UserError
from prunesweep.models.errors import nearest
from prunesweep.pruners import baselines, isomorphic, nvit, taylor, upvit

from .budget import width_path
from .scores import Scores

__all__ = ["PRUNERS", "Pruner", "pruner"]


def cheapest_first(arch: Arch, scores: Scores, budget: float, **settings: Any) -> Cut:
    """Remove what costs least saliency per unit of cost saved, until ``budget`` is met (see ``width_path``)."""
    path = width_path(arch, scores, **settings)
    return path.cut(path.step_for(budget))


@dataclass(frozen=True)
class Pruner:
    """A width method.

    ``score(model, batches, *, progress=None, **settings)`` takes (images B·C·H·W, labels B) batches and returns scores
    of ``kinds``; ``decide(arch, scores, budget, *, measure, **settings)`` turns them into a cut within the budget.
    ``families`` are those that it can serve.
    """

    score: Callable[..., Scores]
    kinds: tuple[str, ...]
    families: Collection[str]
    source: str  # the publication
    decide: Callable[..., Cut] = cheapest_first
    seeded: bool = False  # ``score`` draws random numbers and takes a ``seed``

    def check(self, name: str, arch: Arch) -> None:
        """Raise UserError where this method cannot serve the family of ``arch``."""
        if arch.family not in self.families:
            able = ", ".join(n for n, p in PRUNERS.items() if arch.family in p.families)
            raise UserError(
                f"method {name!r} serves families {', '.join(self.families)}; {arch.source} is a {arch.family!r}, "
                f"for which there are: {able or 'none'}"
            )


ISOMORPHIC = "Isomorphic Pruning, ECCV 2024, arXiv 2407.04616"

PRUNERS: dict[str, Pruner] = {
    "nvit": Pruner(nvit.score, nvit.KINDS, nvit.FAMILIES, "NViT, CVPR 2023, arXiv 2110.04869"),
    "upvit": Pruner(upvit.score, upvit.KINDS, upvit.FAMILIES, "UP-ViT, SCIS 2023, arXiv 2111.15127", seeded=True),
    "isomorphic": Pruner(taylor.score, taylor.KINDS, taylor.FAMILIES, ISOMORPHIC, decide=isomorphic.decide),
    "taylor": Pruner(taylor.score, taylor.KINDS, taylor.FAMILIES, ISOMORPHIC),
    "magnitude": Pruner(baselines.score_magnitude, baselines.KINDS, baselines.FAMILIES, "control"),
    "random": Pruner(baselines.score_random, baselines.KINDS, baselines.FAMILIES, "control", seeded=True),
}


def pruner(name: str) -> Pruner:
    """The pruner of this name. Raises UserError for an unknown one."""
    if name not in PRUNERS:
        raise UserError(f"unknown method {name!r}; known: {', '.join(PRUNERS)}. {nearest(name, PRUNERS)}".strip())
    return PRUNERS[name]
