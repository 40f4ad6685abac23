"""Scores that tell nothing: vectors that are zero throughout, and why."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from prunesweep.models import Arch, UserError, arch_of

from .coupled import coupled_sums
from .scores import Scores, kind_of

__all__ = ["zero_notes"]

WIDTHS = ("embed", "heads", "qk", "v", "attn", "mlp", "sr", "tail")


def zero_notes(model: nn.Module, scores: Scores) -> list[str]:
    """Name the vectors of widths that are zero throughout: nothing tells their units apart, and they go first.

    Args:
        model: the model that was scored.
        scores: of it.

    Returns:
        A line for every kind of units and reason.
    """
    arch = arch_of(model)
    dead = [name for name, vector in scores.vectors.items() if kind_of(name) in WIDTHS and not vector.any()]
    weights = _weight_sums(model, arch) if dead else {}
    found: dict[tuple[str, str], list[str]] = {}
    for name in dead:
        place = name.rpartition(".")[0]
        found.setdefault((kind_of(name), _reason(model, name, weights)), []).append(place)
    return [
        f"scores of {kind!r} are all 0 in {', '.join(places)}: {reason}; nothing tells these units apart, they go first"
        for (kind, reason), places in found.items()
    ]


def _weight_sums(model: nn.Module, arch: Arch) -> dict[str, float]:
    """Sum |w| of all that is cut with the units of a vector, by vector; none where heads have unequal widths."""
    try:
        sums = coupled_sums(arch, {name: p.detach().abs() for name, p in model.named_parameters()})
    except UserError:
        return {}
    return {name: float(vector.sum()) for name, vector in sums.items()}


def _reason(model: nn.Module, name: str, weights: dict[str, float]) -> str:
    if any(not gamma.any() for gamma in _scales(model, name)):
        return "their branch has a LayerScale of 0"
    if weights.get(name) == 0:
        return "all of their weights are 0"
    return "the output does not depend on them"


def _scales(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """LayerScales of the branch that the units of a vector are in."""
    place, _, kind = name.rpartition(".")
    branch = {"mlp": "ls2"}.get(kind, "ls1")
    for own, parameter in model.named_parameters():
        if own == f"{place}.{branch}.gamma":
            yield parameter
