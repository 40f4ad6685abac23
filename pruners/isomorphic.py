"""Isomorphic Pruning's decision: units compete only with units of the same structure, by normalised scores.

Source: Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024 (arXiv 2407.04616). Every vector of scores is
divided by its mean. The units of a *scope* (residual channels of a stage, all MLPs' units, all heads, all head
channels) are then ranked together, one threshold cuts the scope's ratio, and a layer loses what lies below it.

Channels of separable convolutions, which the original does not have, are a scope with the ratio of MLPs.

Two things differ from the original: a layer is cut down to its floor at most (the original silently drops the whole cut
of such a layer), and the source's attention scale is kept, so that the masked source and the cut model are one
function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prunesweep.models import Arch, BlockCut, Cut, UserError, cut_arch
from prunesweep.models.arch import Block
from prunesweep.models.cutting import joint_values

from .coupled import heads_and_dims
from .fill import fill
from .measures import MACS, Measure
from .narrowing import Narrowing
from .ranked import Ranked
from .reached import Reached, meets
from .scores import Scores, check_scores_finite, kind_of

__all__ = ["Ratios", "decide", "isomorphic_cut", "normalised"]


@dataclass(frozen=True, slots=True)
class Ratios:
    """Share of the units that each kind of scope loses, in [0, 1)."""

    embed: float
    mlp: float
    head: float
    dim: float
    sr: float = 0.0

    def scaled(self, t: float) -> Ratios:
        """Multiply all ratios by ``t``."""
        return Ratios(t * self.embed, t * self.mlp, t * self.head, t * self.dim, t * self.sr)


def normalised(arch: Arch, scores: Scores) -> dict[str, torch.Tensor]:
    """Divide every vector of scores by its mean; split a block's channel scores into heads and channels.

        s'_u = s_u / mean(s)        heads: mean of s' over a head's channels        dim: mean of s' over the heads

    A vector of zeros is left as it is: its units go first, and its floor stays.

    Args:
        arch: the record that was scored.
        scores: scores of ``arch``.

    Returns:
        Vectors by name, with ``blocks.I.heads`` (H,) and ``blocks.I.dim`` (E,) in place of ``blocks.I.attn``.

    Raises:
        UserError: a vector has another number of entries than the block has channels, or one that is not finite.
    """
    check_scores_finite(scores)
    found: dict[str, torch.Tensor] = {}
    for name, raw in scores.vectors.items():
        vector = raw / raw.mean() if raw.any() else raw
        if kind_of(name) == "attn":
            index = int(name.split(".")[1])
            found[f"blocks.{index}.heads"], found[f"blocks.{index}.dim"] = heads_and_dims(arch, index, vector)
        else:
            found[name] = vector
    return found


def isomorphic_cut(
    arch: Arch,
    scores: Scores,
    ratios: Ratios,
    *,
    round_to: int = 2,
    isomorphic: bool = True,
    pairs: Sequence[torch.Tensor] | None = None,
) -> Cut:
    """Make the cut at fixed ratios.

    Args:
        arch: the record that was scored.
        scores: raw scores of kinds embed, attn, mlp and sr (``pruners.taylor``).
        ratios: share of every scope's units that goes.
        round_to: widths that lose units are rounded down to a multiple of this; heads are not.
        isomorphic: False puts all but the heads into one scope, with ``ratios.embed`` (the paper's ablation).
        pairs: ``taylor.attention_pairs`` of every block of a ViT: every head then drops its own channels, ranked over
            the residual channels that stay, as the paper's published models did; by default all heads drop the same.

    Raises:
        UserError: a ratio is outside [0, 1).
    """
    for name in Ratios.__slots__:
        if not 0 <= getattr(ratios, name) < 1:
            raise UserError(f"ratios.{name} = {getattr(ratios, name)}: must lie in [0, 1)")
    vectors = normalised(arch, scores)
    return _cut(arch, vectors, _kept(vectors, ratios, round_to, isomorphic), pairs)


def _kept(
    vectors: Mapping[str, torch.Tensor], ratios: Ratios, round_to: int, isomorphic: bool = True
) -> dict[str, int]:
    """Return the number of units that stay of every vector that has a scope."""
    counts: dict[str, int] = {}
    for scope, ratio in _scopes(vectors, ratios, isomorphic):
        counts |= _counts({name: vectors[name] for name in scope}, ratio, _multiple(scope[0], round_to))
    return counts


def _multiple(name: str, round_to: int) -> int:
    return 1 if kind_of(name) == "heads" else round_to


def _order(vector: torch.Tensor) -> list[int]:
    """Order units, the most important first."""
    return torch.argsort(vector, descending=True, stable=True).tolist()


def _cut(
    arch: Arch,
    vectors: Mapping[str, torch.Tensor],
    counts: Mapping[str, int],
    pairs: Sequence[torch.Tensor] | None = None,
) -> Cut:
    """Make the cut that keeps the best ``counts`` units of the vectors."""
    kept = {name: tuple(sorted(_order(vectors[name])[:count])) for name, count in counts.items()}
    embed = tuple(kept.get(f"stages.{s}.embed") for s in range(len(arch.stages)))
    choices = (_choice(i, block, kept, embed[0], pairs) for i, block in enumerate(arch.blocks))
    return Cut(embed=embed, blocks=tuple(choices))


def _scopes(vectors: Mapping[str, torch.Tensor], ratios: Ratios, isomorphic: bool) -> list[tuple[list[str], float]]:
    """Return the vectors of every scope, and its ratio."""
    kinds = ("embed", "mlp", "heads", "dim", "sr", "v")
    of_kind = {kind: [n for n in vectors if kind_of(n) == kind] for kind in kinds}
    if not isomorphic:
        rest = [*of_kind["embed"], *of_kind["mlp"], *of_kind["dim"], *of_kind["sr"], *of_kind["v"]]
        return [(names, ratio) for names, ratio in ((rest, ratios.embed), (of_kind["heads"], ratios.head)) if names]
    scopes = [([name], ratios.embed) for name in of_kind["embed"]]
    by_kind = (
        ("mlp", ratios.mlp),
        ("heads", ratios.head),
        ("dim", ratios.dim),
        ("sr", ratios.sr),
        ("v", ratios.mlp),
    )
    return scopes + [(of_kind[kind], ratio) for kind, ratio in by_kind if of_kind[kind]]


def _counts(members: Mapping[str, torch.Tensor], ratio: float, round_to: int) -> dict[str, int]:
    """Return the number of units that every layer of a scope keeps."""
    units = torch.cat(list(members.values()))
    cut = len(units) - math.floor(len(units) * (1 - ratio) + 1e-9)
    if not cut:
        return {name: len(vector) for name, vector in members.items()}
    threshold = units.kthvalue(cut).values
    counts = {}
    for name, vector in members.items():
        count = len(vector) - int((vector <= threshold).sum())
        if count < len(vector):
            count = max(count - count % round_to, min(round_to, len(vector)))
        counts[name] = count
    return counts


def _choice(
    index: int,
    block: Block,
    kept: Mapping[str, tuple[int, ...]],
    embed: tuple[int, ...] | None,
    pairs: Sequence[torch.Tensor] | None,
) -> BlockCut:
    heads, dims = kept.get(f"blocks.{index}.heads"), kept.get(f"blocks.{index}.dim")
    mlp, sr = kept.get(f"blocks.{index}.mlp"), kept.get(f"blocks.{index}.sr")
    if block.convolves:
        channels = kept.get(f"blocks.{index}.v")
        return BlockCut(v=None if channels is None else (channels,), mlp=mlp)
    if heads is None:
        return BlockCut(mlp=mlp, sr=sr)
    if dims is None:  # of attention between channels
        return BlockCut.aligned(block, heads=heads, qk=range(block.qk), v=range(block.qk), mlp=mlp)
    own = [dims] * len(heads)
    if pairs is not None:
        columns = pairs[index] if embed is None else pairs[index][:, list(embed)]
        per_head = columns.sum(1).view(block.heads, -1)
        order = [torch.argsort(per_head[h], descending=True, stable=True)[: len(dims)] for h in heads]
        own = [tuple(sorted(channels.tolist())) for channels in order]
    flat = tuple(tuple(h * block.qk + j for j in channels) for h, channels in zip(heads, own, strict=True))
    return BlockCut(qk=flat, v=tuple(joint_values(block, head) for head in flat), mlp=mlp, sr=sr)


def decide(
    arch: Arch,
    scores: Scores,
    budget: float,
    *,
    measure: Measure = MACS,
    ratios: Ratios = Ratios(0.5, 0.5, 0.5, 0.25, 0.5),
    round_to: int = 2,
) -> Reached:
    """Find the cut within ``budget`` whose ratios are a common multiple of ``ratios``, by bisection.

    The narrowest cut of this form above the budget then loses single steps until the budget is met (``fill``), by least
    normalised score per cost saved.

    Args:
        arch: the record that was scored.
        scores: scores of ``arch``.
        budget: largest cost, in ``measure``'s unit.
        measure: the cost.
        ratios: proportions of the ratios; by default those of the paper's DeiT-4.2G.
        round_to: widths that lose units are multiples of this.

    Raises:
        UserError: the floors do not let the budget be reached.
    """
    vectors = normalised(arch, scores)

    def at(t: float) -> tuple[dict[str, int], float]:
        counts = _kept(vectors, ratios.scaled(t), round_to)
        return counts, measure(cut_arch(arch, _cut(arch, vectors, counts)))

    low, high = 0.0, (1 - 1e-6) / max(getattr(ratios, name) for name in Ratios.__slots__)
    best, narrowest = at(high)
    above, whole = at(0.0)
    if narrowest > budget:
        raise UserError(
            f"{budget:,.6g} {measure.name} cannot be reached: the narrowest model has {narrowest:,.6g}. Raise the "
            "budget, or drop blocks"
        )
    if whole <= budget:
        hindrance = "" if meets(whole, budget) else f"the whole model has {whole:,.6g}"
        return Reached(_cut(arch, vectors, above), whole, budget, hindrance)
    below = narrowest
    for _ in range(40):  # then low and high differ by less than one unit of any scope
        middle = (low + high) / 2
        found, cost = at(middle)
        if cost <= budget:
            best, below, high = found, cost, middle
        else:
            above, low = found, middle
        if high - low < 1e-6:
            break
    if meets(below, budget):
        return Reached(_cut(arch, vectors, best), below, budget)
    ranked = {name: _ranked(name, vectors[name], count, round_to) for name, count in above.items()}
    gone = {name: len(vectors[name]) - count for name, count in above.items()}
    filled = fill(Narrowing(arch, measure, gone=gone), ranked, {}, budget)
    if not below < filled.cost < math.inf:
        return Reached(_cut(arch, vectors, best), below, budget, filled.hindrance)
    counts = {name: above[name] - units for name, units in filled.gone.items()}
    return Reached(_cut(arch, vectors, counts), filled.cost, budget, filled.hindrance)


def _ranked(name: str, vector: torch.Tensor, left: int, round_to: int) -> Ranked:
    """Rank the best ``left`` units for ``fill``; a width that is no multiple stays one, unless it has lost units."""
    multiple = _multiple(name, round_to)
    order = _order(vector)[:left][::-1]
    summed = np.concatenate([[0.0], vector[order].cumsum(0).numpy()])
    return Ranked(tuple(order), summed, multiple, finest=multiple, floor=multiple)
