"""The width method: whose scores say which units go first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, Field

from prunesweep.models import Arch, UserError
from prunesweep.models.errors import nearest
from prunesweep.pruners import Scores, WidthMethod, get_method, method_names, vector_sizes
from prunesweep.search.space.variables import Params, Variable

from .base import Axis, Draft, ScoredSource

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "Method"]


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    known = method_names(WidthMethod)
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no method; known: {', '.join(known)}. {nearest(name, known)}".strip())
    if len(set(names)) < len(names):
        raise ValueError("names a method twice")
    return names


@dataclass(frozen=True, kw_only=True)
class Method(Axis):
    """A choice among ``space.methods``; without those, the one method of ``scores.method``."""

    def fields(self) -> dict[str, tuple[Any, Any]]:
        """``methods``: names in ``pruners.METHODS``."""
        return {
            "methods": (
                Annotated[
                    tuple[str, ...],
                    AfterValidator(_known),
                    Field(description="Width methods of which every candidate takes one; unset: scores.method."),
                ],
                (),
            )
        }

    def needs(self, table: SpaceTable, method: str) -> tuple[str, ...]:
        """The scores of all methods; scores are named by their method."""
        return table.methods or (method,)

    def blank(self, name: str, arch: Arch) -> Scores:
        """Ones for every unit. Raises UserError for a method that does not serve ``arch`` or decides by ratios."""
        method = get_method(name, WidthMethod)
        method.check(arch)
        if not method.along_path:
            raise UserError(f"method {name!r}: decides by ratios, not along one path of budgets; use 'taylor'")
        return Scores({vector: torch.ones(size) for vector, size in vector_sizes(arch, method.kinds).items()})

    def variables(self, table: SpaceTable, source: ScoredSource) -> tuple[Variable, ...]:
        """One choice of the methods; the first entry of the scores is the default method's."""
        return (Variable(self.name, self.meaning, choices=table.methods or (next(iter(source.scores)),)),)

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Cut widths by the scores of the chosen method."""
        return dataclasses.replace(draft, method=str(point[self.name]))


AXIS = Method(name="method", meaning="how widths are scored")
