"""NViT's iterative pruning, the decisions: which groups go in one step, from saliency and the current cost of a unit.

Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023 (arXiv 2110.04869),
section 3 and eq. 7, and the code that its published models were made with. The adjusted saliency of a unit is

    A' = keep * A - eta * gain        gain = cost(dims) - cost(dims, one unit less)

    A      saliency of the unit                     keep   1 for a live unit, 0 for a pruned one
    eta    saliency per unit of cost                dims   widths of all vectors at the moment

The units of a vector, sorted by A', form groups of a kind's size; a group's score is the sum over its units. Everything
here is a pure function of float64 vectors, named and ordered as ``pruners.scores`` has them. Equal scores are ordered
by vector, then by place in the vector, so that all ranks and machines decide alike.
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
from prunesweep.models.families import FamiliesWith
from prunesweep.models.latency.table import LatencyTable
from prunesweep.pruners.budget import GROUP_SIZES, Measure
from prunesweep.pruners.scores import kind_of, vector_sizes

__all__ = [
    "FAMILIES",
    "KINDS",
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

KINDS = ("embed", "heads", "qk", "v", "mlp")
FAMILIES = FamiliesWith(
    "images",
    "width",
    without={"spatial_reduction": "channels of a reduced map are no kind that its steps remove"},
)
Vectors = Mapping[str, torch.Tensor]
NVIT_GROUPS: Mapping[str, int] = MappingProxyType({kind: GROUP_SIZES[kind] for kind in KINDS})


@dataclass(frozen=True)
class PruneGroup:
    """Units of one vector that are removed together."""

    vector: str
    units: tuple[int, ...]
    score: float  # sum of A'


@dataclass(frozen=True)
class Step:
    """One pruning step: the groups that it removes, lowest score first, and its threshold.

    The threshold is the highest score that the step would have removed.
    """

    removed: tuple[PruneGroup, ...]
    threshold: float


@dataclass(frozen=True)
class Grouping:
    """The way units are grouped: ``sizes`` by kind (0 leaves the kind whole), and ``floors``, the shares that stay.

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
        """Return the number of units in a group of a vector."""
        return self.sizes[kind_of(name)]

    def floor(self, name: str, full: int) -> int:
        """Return the number of units of a vector of ``full`` units that always stay."""
        return math.ceil(self.floors.get(kind_of(name), 0.0) * full)

    def removable(self, name: str, live: int, full: int) -> int:
        """Return the number of groups that may still go from a vector of ``full`` units, ``live`` of which are left."""
        size = self.size(name)
        if not size or live < 1:
            return 0
        return max(min(-(-live // size) - 1, (live - self.floor(name, full)) // size), 0)

    def narrowest(self, full: Mapping[str, int]) -> dict[str, int]:
        """Return the dimensions when no group can go any more."""
        return {name: n - self.size(name) * self.removable(name, n, n) for name, n in full.items()}


def dims_of(keep: Vectors) -> dict[str, int]:
    """Count the units that are left of every vector."""
    return {name: int(mask.sum()) for name, mask in keep.items()}


def narrow(arch: Arch, dims: Mapping[str, int]) -> Arch:
    """Return ``arch`` with other widths.

    Args:
        arch: the record.
        dims: units by vector; a vector that is not named keeps its width.
    """
    stages, i = [], 0
    for s, stage in enumerate(arch.stages):
        blocks = []
        for block in stage.blocks:
            blocks.append(dataclasses.replace(block, **_own(i, dims)))
            i += 1
        width = dims.get(f"stages.{s}.embed", stage.width)
        stages.append(dataclasses.replace(stage, width=width, blocks=tuple(blocks)))
    return arch.with_stages(tuple(stages))


def _own(block: int, vectors: Mapping[str, Any]) -> dict[str, Any]:
    """Select what ``vectors`` holds for one block, by kind."""
    names = {kind: f"blocks.{block}.{kind}" for kind in KINDS}
    return {kind: vectors[name] for kind, name in names.items() if name in vectors}


def cut_of(arch: Arch, keep: Vectors) -> Cut:
    """Turn masks into a cut.

    Args:
        arch: the record that is cut.
        keep: bool masks, True for a unit that stays, of every vector of ``vector_sizes(arch, nvit.KINDS)``.
    """
    kept = {name: tuple(torch.nonzero(mask)[:, 0].tolist()) for name, mask in keep.items()}
    choices = []
    for i, block in enumerate(arch.blocks):
        own = {"mlp": None} | _own(i, kept)
        if "heads" not in own and "v" in own:  # of a separable convolution
            own["v"] = (own["v"],)
        if "heads" in own and isinstance(block.v, int):  # of attention between channels, heads alone
            own = {"qk": range(block.qk), "v": range(block.v)} | own
        choices.append(BlockCut.aligned(block, **own) if "heads" in own else BlockCut(**own))
    return Cut(embed=tuple(kept[f"stages.{s}.embed"] for s in range(len(arch.stages))), blocks=tuple(choices))


def total_cost(measure: Measure | LatencyTable, arch: Arch) -> float:
    """Compute the cost of a record.

    Args:
        measure: MACs or parameters, or a table that predicts milliseconds per batch.
        arch: the record.
    """
    return measure.predict(arch) if isinstance(measure, LatencyTable) else measure(arch)


def unit_gains(
    measure: Measure | LatencyTable, arch: Arch, full: Mapping[str, int], grouping: Grouping
) -> dict[str, float]:
    """Compute what one unit less of every vector saves at the widths of ``arch``.

    A negative gain would be noise and becomes 0.
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
    """Compute A' = keep * A - eta * gain of every unit (arXiv 2110.04869, eq. 7).

    Args:
        scores: A by vector.
        keep: bool masks by vector, True for a live unit.
        gains: cost saved by one unit less, by vector.
        eta: saliency per unit of cost.

    Returns:
        A' by vector, float64.
    """
    return {name: scores[name].double() * mask - eta * gains[name] for name, mask in keep.items()}


def live_step(adjusted: Vectors, keep: Vectors, grouping: Grouping, groups: int) -> Step:
    """Remove the groups with the lowest scores; only live units form groups, so nothing that is gone counts again.

    Args:
        adjusted: A' by vector.
        keep: bool masks by vector, True for a live unit.
        grouping: sizes of groups, and floors.
        groups: number of groups to remove; fewer go where no more can.
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
    """Return the place of the threshold among sorted group scores, in the published code's schedule.

    Args:
        step: number of the pruning step, from 0.
        groups: groups per step.
        total: number of groups.
    """
    return min(max(step * groups - 1, 0), total - 1)


def reference_step(adjusted: Vectors, keep: Vectors, grouping: Grouping, groups: int, step: int) -> Step:
    """Remove groups by the schedule of the published code, which ranks pruned units again at every step.

    All units form groups, pruned ones too. The threshold is the score of the group at ``reference_index``; every group
    up to it goes, but for a vector's last one. A step may thus remove no group, or many more than ``groups``.

    Args:
        adjusted: A' by vector.
        keep: bool masks by vector, True for a live unit.
        grouping: sizes of groups, and floors.
        groups: groups per step.
        step: number of the pruning step, from 0.
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
    """Sort units of a vector by rising A' and split them into groups, the last of which may be smaller.

    Args:
        name: of the vector.
        vector: A' of all of its units, (n,).
        units: indices of the units to group, (k,) int64.
        size: units per group; 0 makes no groups.
    """
    if not size:
        return []
    order = units[torch.argsort(vector[units], stable=True)]
    return [
        PruneGroup(name, tuple(sorted(chunk.tolist())), float(vector[chunk].sum()))
        for chunk in torch.split(order, size)
        if len(chunk)
    ]
