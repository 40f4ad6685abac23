"""NViT's iterative pruning, the decisions: which groups go in one step, from saliency and what a unit costs now.

Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023 (arXiv 2110.04869),
section 3 and eq. 7, and the code that its published models were made with. A unit of saliency A is worth

    A' = keep * A - eta * gain        gain = cost(dims) - cost(dims, one unit less)

at the dimensions of the moment. The units of a vector, sorted by A', form groups of a kind's size; a group's score is
the sum over its units. Pure functions of float64 vectors, named and ordered as ``pruners.scores`` has them. Equal
scores are ordered by vector, then by place in the vector, so that all ranks and machines decide alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from prunesweep.models import Arch, BlockCut, Cut, UserError
from prunesweep.models.latency.table import LatencyTable
from prunesweep.pruners.budget import GROUP_SIZES, Measure
from prunesweep.pruners.scores import kind_of, vector_sizes

from .saliency import KINDS

__all__ = [
    "NVIT_GROUPS",
    "Grouping",
    "PruneGroup",
    "Step",
    "adjust",
    "cut_of",
    "dims_of",
    "form_groups",
    "live_step",
    "narrow",
    "reference_index",
    "reference_step",
    "total_cost",
    "unit_gains",
]

Vectors = Mapping[str, torch.Tensor]
NVIT_GROUPS: Mapping[str, int] = MappingProxyType({kind: GROUP_SIZES[kind] for kind in KINDS})


@dataclass(frozen=True)
class PruneGroup:
    """Units of one vector that go, or went, together."""

    vector: str
    units: tuple[int, ...]
    score: float  # sum of A'


@dataclass(frozen=True)
class Step:
    """What one pruning step removes, lowest score first, and the highest score that it would have removed."""

    removed: tuple[PruneGroup, ...]
    threshold: float


@dataclass(frozen=True)
class Grouping:
    """How units group: ``sizes`` by kind (0 leaves the kind whole), and ``floors``, shares of a vector that stay.

    The last group of a vector always stays, whatever its size.
    """

    sizes: Mapping[str, int] = field(default_factory=lambda: NVIT_GROUPS)
    floors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = all(type(n) is int and n >= 0 for n in self.sizes.values())
        if set(self.sizes) != set(KINDS) or not whole or not any(self.sizes.values()):
            raise UserError(
                f"groups = {dict(self.sizes)}: give a whole number of at least 0 for each of {', '.join(KINDS)}, "
                "and not 0 for all"
            )
        for kind, share in self.floors.items():
            if kind not in KINDS or not 0 <= share <= 1:
                raise UserError(f"floors = {dict(self.floors)}: give shares in 0..1 for some of {', '.join(KINDS)}")

    def size(self, name: str) -> int:
        """Units in a group of a vector."""
        return self.sizes[kind_of(name)]

    def floor(self, name: str, full: int) -> int:
        """Units that stay of the ``full`` ones of a vector."""
        return math.ceil(self.floors.get(kind_of(name), 0.0) * full)

    def removable(self, name: str, live: int, full: int) -> int:
        """Groups that may still go from a vector of ``full`` units, ``live`` of which are left."""
        size = self.size(name)
        if not size or live < 1:
            return 0
        return max(min(-(-live // size) - 1, (live - self.floor(name, full)) // size), 0)

    def narrowest(self, full: Mapping[str, int]) -> dict[str, int]:
        """Dimensions when nothing more can go."""
        return {name: n - self.size(name) * self.removable(name, n, n) for name, n in full.items()}


def dims_of(keep: Vectors) -> dict[str, int]:
    """Units that are left of every vector."""
    return {name: int(mask.sum()) for name, mask in keep.items()}


def narrow(arch: Arch, dims: Mapping[str, int]) -> Arch:
    """``arch`` with these widths; vectors that are not named keep theirs."""
    stages, i = [], 0
    for s, stage in enumerate(arch.stages):
        blocks = []
        for block in stage.blocks:
            blocks.append(dataclasses.replace(block, **_own(i, dims)))
            i += 1
        width = dims.get(f"stages.{s}.embed", stage.width)
        stages.append(dataclasses.replace(stage, width=width, blocks=tuple(blocks)))
    return dataclasses.replace(arch, stages=tuple(stages))


def _own(block: int, vectors: Mapping[str, Any]) -> dict[str, Any]:
    """What ``vectors`` says of one block, by kind."""
    names = {kind: f"blocks.{block}.{kind}" for kind in KINDS}
    return {kind: vectors[name] for kind, name in names.items() if name in vectors}


def cut_of(arch: Arch, keep: Vectors) -> Cut:
    """The decision that masks stand for: what is kept of every vector of ``vector_sizes(arch, nvit.KINDS)``."""
    kept = {name: tuple(torch.nonzero(mask)[:, 0].tolist()) for name, mask in keep.items()}
    choices = []
    for i, block in enumerate(arch.blocks):
        own = {"mlp": None} | _own(i, kept)
        choices.append(BlockCut.aligned(block, **own) if "heads" in own else BlockCut(**own))
    return Cut(embed=tuple(kept[f"stages.{s}.embed"] for s in range(len(arch.stages))), blocks=tuple(choices))


def total_cost(measure: Measure | LatencyTable, arch: Arch) -> float:
    """Cost of a record: MACs, parameters, or the predicted milliseconds per batch of a table."""
    return measure.predict(arch) if isinstance(measure, LatencyTable) else measure(arch)


def unit_gains(
    measure: Measure | LatencyTable, arch: Arch, full: Mapping[str, int], grouping: Grouping
) -> dict[str, float]:
    """What one unit less of every vector saves at the widths of ``arch``; never negative, which would be noise.

    Nothing is gained where a vector is down to one group, or to its floor, except in the residual stream (whose last
    group is protected like the others', but goes on to weigh on the scores).

    Args:
        measure: ``MACS``, ``PARAMS`` or a latency table.
        arch: the record as it is now.
        full: units of every vector before anything was pruned.
        grouping: group sizes and floors.
    """
    table = measure.unit_gains(arch) if isinstance(measure, LatencyTable) else None
    now, cost = vector_sizes(arch, KINDS), total_cost(measure, arch)
    gains = {}
    for name in full:
        least = 1 if kind_of(name) == "embed" else max(grouping.size(name), grouping.floor(name, full[name]), 1)
        if now[name] <= least:
            gains[name] = 0.0
        elif table is not None:
            gains[name] = table[name]
        else:
            gains[name] = max(cost - total_cost(measure, narrow(arch, {name: now[name] - 1})), 0.0)
    return gains


def adjust(scores: Vectors, keep: Vectors, gains: Mapping[str, float], eta: float) -> dict[str, torch.Tensor]:
    """A' = keep * A - eta * gain of every unit. ``eta`` is saliency per unit of what the gains are counted in."""
    return {name: scores[name].double() * mask - eta * gains[name] for name, mask in keep.items()}


def live_step(adjusted: Vectors, keep: Vectors, grouping: Grouping, groups: int) -> Step:
    """Remove the ``groups`` lowest groups of live units; fewer where no more can go.

    Only live units are sorted into groups, so nothing that is gone counts again.
    """
    candidates = []
    for rank, (name, vector) in enumerate(adjusted.items()):
        live = torch.nonzero(keep[name])[:, 0]
        removable = grouping.removable(name, len(live), len(vector))
        for place, group in enumerate(form_groups(name, vector, live, grouping.size(name))[:removable]):
            candidates.append((group.score, rank, place, group))
    chosen = tuple(group for *_, group in sorted(candidates, key=lambda c: c[:3])[:groups])
    return Step(chosen, chosen[-1].score if chosen else -math.inf)


def reference_index(step: int, groups: int, total: int) -> int:
    """Place of the threshold among ``total`` sorted group scores at pruning step ``step`` (from 0)."""
    return min(max(step * groups - 1, 0), total - 1)


def reference_step(adjusted: Vectors, keep: Vectors, grouping: Grouping, groups: int, step: int) -> Step:
    """The schedule of the published code: cumulative over steps, so what is gone is ranked and counted again.

    All units form groups, pruned ones too. The threshold is the score of the group at ``reference_index``; every group
    up to it goes, but for a vector's last one. A step may thus remove no group, or many more than ``groups``.
    """
    ranked = {
        name: form_groups(name, vector, torch.arange(len(vector)), grouping.size(name))
        for name, vector in adjusted.items()
        if grouping.size(name)
    }
    scores = sorted(group.score for own in ranked.values() for group in own)
    threshold = scores[reference_index(step, groups, len(scores))]
    removed = []
    for name, own in ranked.items():
        full = len(adjusted[name])
        for group in own[: grouping.removable(name, full, full)]:
            live = tuple(u for u in group.units if keep[name][u])
            if live and group.score <= threshold:
                removed.append(dataclasses.replace(group, units=live))
    return Step(tuple(sorted(removed, key=lambda group: group.score)), threshold)


def form_groups(name: str, vector: torch.Tensor, units: torch.Tensor, size: int) -> list[PruneGroup]:
    """``units`` of a vector by rising A', in groups of ``size``, the last of which may be smaller."""
    if not size:
        return []
    order = units[torch.argsort(vector[units], stable=True)]
    return [
        PruneGroup(name, tuple(sorted(chunk.tolist())), float(vector[chunk].sum()))
        for chunk in torch.split(order, size)
        if len(chunk)
    ]
