"""UP-ViT's decision: every group keeps the units with the highest scores, as many as the target architecture has.

Source: Yu and Wu, "A Unified Pruning Framework for Vision Transformers" (arXiv 2111.15127); which units form a group is
what its published models were cut by. Scores do not depend on the target: score once, cut any number of times.

- Residual channels: one list for a whole stage. MLP units: one list per block, all of a stage equally long.
- Attention: the source's channels are split into as many contiguous groups as the target has heads, and each group's
  best become a head. Such a head mixes channels of several source heads, which no score has seen; ``whole_heads``
  instead keeps the heads with the highest sums, and is the better start wherever heads go.
- Blocks: one shot, those with the lowest scores for leaving the whole block out; or in the order of progressive scores.

Two rules are added: one budget of MLP units for all blocks, which fits because all scores are in nats over the same
images, and lists for PVTv2's reduced map. The source's attention scale stays in the record, so nothing is folded into
the query weights where heads become narrower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from prunesweep.models import Arch, BlockCut, Cut, UserError
from prunesweep.models.arch import Block
from prunesweep.models.cutting import joint_values
from prunesweep.models.families import family_of
from prunesweep.pruners.scores import Scores, unit_counts

from .importance import SKIP

__all__ = ["Target", "select"]

Counts = int | Sequence[int] | None
Indices = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The widths of the cut model: one number for all stages, one per stage, or ``None`` to leave a width as it is."""

    embed: Counts = None  # residual width
    heads: Counts = None  # per block
    head_width: Counts = None  # of queries, keys and values
    mlp: Counts = None  # hidden units per block
    mlp_total: int | None = None  # hidden units of all blocks that stay, instead of ``mlp``
    depth: Counts = None  # blocks
    tails: Counts = None  # channels of a language model's words, one number per band from the second on

    def per_stage(self, name: str, stages: int) -> tuple[int | None, ...]:
        """Return the numbers of one field. Raises UserError for another number of stages."""
        counts: Counts = getattr(self, name)
        if counts is None or isinstance(counts, int):
            return (counts,) * stages
        if len(counts) != stages:
            raise UserError(f"target.{name} has {len(counts)} entries for {stages} stages")
        return tuple(counts)


def select(
    arch: Arch,
    scores: Scores,
    target: Target,
    *,
    blocks: Scores | None = None,
    attn_group: str = "contiguous",
    mlp_floor: float = 0.1,
    sr: str = "own",
) -> Cut:
    """Make the cut of ``arch`` down to ``target``.

    Args:
        arch: the record that was scored.
        scores: of ``upvit.score``, or any of kinds embed, attn, mlp and sr.
        target: what is to stay.
        blocks: of ``upvit.score_blocks`` (one shot) or ``upvit.score_depth``, where blocks go.
        attn_group: ``contiguous`` or ``whole_heads``: how heads become fewer.
        mlp_floor: share of its units that every block keeps under ``target.mlp_total``; one always stays.
        sr: what PVTv2's reduced map keeps where the residual width shrinks, by the same ratio: its ``own`` best
            channels, or the channels of the residual stream (``neck``), which needs a map as wide as that.

    Raises:
        UserError: scores of another model, a target that the source cannot be cut to, or an unknown rule.
    """
    _one_of("attn_group", attn_group, ("contiguous", "whole_heads"))
    _one_of("sr", sr, ("own", "neck"))
    if target.mlp is not None and target.mlp_total is not None:
        raise UserError("target.mlp and target.mlp_total are both given: give one of them")
    _check_scores(arch, scores)
    count = len(arch.stages)
    dropped = _dropped(arch, target.per_stage("depth", count), blocks)
    widths = target.per_stage("embed", count)
    embed = tuple(
        None if width is None else _best(_vector(scores, f"stages.{s}.embed"), width, f"target.embed of stage {s}")
        for s, width in enumerate(widths)
    )
    mlp = _mlp_units(arch, scores, target, dropped, mlp_floor)
    per_head = list(zip(target.per_stage("heads", count), target.per_stage("head_width", count), strict=True))
    choices = []
    for i, (s, block) in enumerate(_with_stage(arch)):
        if i in dropped:
            choices.append(BlockCut(keep=False))
            continue
        attn = None
        if block.mixer == "attn" and per_head[s] != (None, None):
            attn = _attention(arch, i, _vector(scores, f"blocks.{i}.attn"), *per_head[s], attn_group)
        own_sr = None
        if block.sr and (kept := embed[s]) is not None:
            own_sr = _reduced(arch, i, s, scores, kept, sr)
        values = None if attn is None else tuple(joint_values(block, head) for head in attn)
        choices.append(BlockCut(qk=attn, v=values, mlp=mlp.get(i), sr=own_sr))
    whole = embed == (None,) * count
    return Cut(embed=None if whole else embed, blocks=tuple(choices), tails=_tails(arch, scores, target))


def _tails(arch: Arch, scores: Scores, target: Target) -> tuple[Indices | None, ...] | None:
    """Choose the channels that the words of the bands keep."""
    if target.tails is None:
        return None
    number = len(arch.bands[1:])
    counts = (target.tails,) * number if isinstance(target.tails, int) else tuple(target.tails)
    if len(counts) != number:
        raise UserError(f"target.tails has {len(counts)} entries for {number} bands behind the first")
    names = [f"bands.{b}.tail" for b in range(1, number + 1)]
    return tuple(
        _best(_vector(scores, name), width, f"target.tails of {name}")
        for name, width in zip(names, counts, strict=True)
    )


def _with_stage(arch: Arch) -> Iterator[tuple[int, Block]]:
    return ((s, block) for s, stage in enumerate(arch.stages) for block in stage.blocks)


def _vector(scores: Scores, name: str) -> torch.Tensor:
    if name not in scores.vectors:
        raise UserError(f"scores: {name} is missing; the target needs it")
    return scores.vectors[name]


def _best(vector: torch.Tensor, count: int, what: str) -> Indices:
    """Return the ``count`` highest scores' indices, ascending; of equal scores, the lower index goes first."""
    if not 1 <= count <= len(vector):
        raise UserError(f"{what} = {count}: must lie in 1..{len(vector)}")
    return tuple(sorted(torch.argsort(vector, stable=True)[len(vector) - count :].tolist()))


def _dropped(arch: Arch, depths: Sequence[int | None], blocks: Scores | None) -> set[int]:
    if all(depth is None for depth in depths):
        return set()
    if blocks is None or not {"depth", SKIP} & set(blocks.vectors):
        raise UserError("target.depth needs scores of blocks: give blocks = upvit.score_blocks(model, batches)")
    vector = blocks.vectors["depth"] if "depth" in blocks.vectors else blocks.vectors[SKIP][0::2]
    if len(vector) != arch.depth:
        raise UserError(f"scores of {len(vector)} blocks, but {arch.source} has {arch.depth}")
    dropped, first = set(range(arch.depth)), 0
    for s, (stage, depth) in enumerate(zip(arch.stages, depths, strict=True)):
        size = len(stage.blocks)
        own = _best(vector[first : first + size], size if depth is None else depth, f"target.depth of stage {s}")
        dropped -= {first + i for i in own}
        first += size
    return dropped


def _mlp_units(arch: Arch, scores: Scores, target: Target, dropped: set[int], floor: float) -> dict[int, Indices]:
    """Choose the hidden units that stay, of every block where some go."""
    if target.mlp is None and target.mlp_total is None:
        return {}
    live = {i: _vector(scores, f"blocks.{i}.mlp") for i, b in enumerate(arch.blocks) if b.mlp and i not in dropped}
    if target.mlp_total is not None:
        return _global_mlp(live, target.mlp_total, floor)
    counts = target.per_stage("mlp", len(arch.stages))
    stage_of = [s for s, _ in _with_stage(arch)]
    units = {i: (vector, counts[stage_of[i]]) for i, vector in live.items()}
    return {i: _best(v, n, f"target.mlp of block {i}") for i, (v, n) in units.items() if n is not None}


def _global_mlp(live: Mapping[int, torch.Tensor], total: int, floor: float) -> dict[int, Indices]:
    """Rank all blocks' units together, each block's best ``floor`` of them first of all."""
    if not 0 <= floor <= 1:
        raise UserError(f"mlp_floor = {floor}: must lie in [0, 1]")
    ranked, least = [], 0
    for vector in live.values():
        safe = max(1, math.ceil(floor * len(vector)))
        least += safe
        ranked.append(vector.double().index_fill(0, torch.tensor(_best(vector, safe, "mlp_floor")), torch.inf))
    sizes = [len(vector) for vector in ranked]
    if not least <= total <= sum(sizes):
        raise UserError(f"target.mlp_total = {total}: must lie in {least}..{sum(sizes)}, with mlp_floor = {floor}")
    kept = torch.zeros(sum(sizes), dtype=torch.bool)
    kept[list(_best(torch.cat(ranked), total, "target.mlp_total"))] = True
    parts = torch.split(kept, sizes)
    return {i: tuple(torch.nonzero(part)[:, 0].tolist()) for i, part in zip(live, parts, strict=True)}


def _attention(
    arch: Arch, i: int, vector: torch.Tensor, heads: int | None, width: int | None, group: str
) -> tuple[Indices, ...]:
    """Choose the flat channels of every new head."""
    block = arch.blocks[i]
    heads, width = block.heads if heads is None else heads, block.qk if width is None else width
    if group == "contiguous" and heads != block.heads:
        groups = vector.view(_contiguous(arch, i, heads), -1)
        members: Sequence[int] = range(heads)
    else:
        groups = vector.view(block.heads, -1)
        members = _best(groups.sum(1), heads, f"target.heads of block {i}")
    what, size = f"target.head_width of block {i}", groups.shape[1]
    own = {g: _best(groups[g], width, what) for g in members}
    if arch.qk_norm:  # all heads share one q and one k LayerNorm
        own = dict.fromkeys(members, _best(groups[list(members)].sum(0), width, what))
    return tuple(tuple(g * size + c for c in own[g]) for g in members)


def _contiguous(arch: Arch, i: int, heads: int) -> int:
    """Return ``heads``, where block ``i``'s channels make as many groups."""
    block = arch.blocks[i]
    able = [h for h in range(1, block.heads + 1) if block.heads * block.qk % h == 0]
    if arch.qk_norm:
        raise UserError("attn_group = 'contiguous': with q/k norm a head cannot mix others; use 'whole_heads'")
    if only := family_of(arch).one_head_only:
        raise UserError(f"attn_group = 'contiguous': {only}; use 'whole_heads'")
    if heads not in able:
        raise UserError(
            f"target.heads = {heads}: the {block.heads * block.qk} units of block {i} make equal contiguous groups for "
            f"{', '.join(map(str, able))} heads; take one of these, or attn_group = 'whole_heads'"
        )
    return heads


def _reduced(arch: Arch, i: int, s: int, scores: Scores, embed: Indices, rule: str) -> Indices:
    """Choose the channels that PVTv2's reduced map of block ``i`` keeps."""
    width, own = arch.stages[s].width, arch.blocks[i].sr
    if rule == "own":
        return _best(_vector(scores, f"blocks.{i}.sr"), max(1, own * len(embed) // width), "channels of a reduced map")
    if own != width:
        raise UserError(f"sr = 'neck': the map of block {i} has {own} channels, its stage {width}; use sr = 'own'")
    return embed


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} = {value!r}: must be one of {', '.join(allowed)}")


def _check_scores(arch: Arch, scores: Scores) -> None:
    counts = unit_counts(arch)
    for name, vector in scores.vectors.items():
        if counts.get(name) != len(vector):
            raise UserError(f"scores have {len(vector)} entries for {name}, {arch.source} has {counts.get(name, 0)}")
