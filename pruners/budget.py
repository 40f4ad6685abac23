"""From scores to a width cut that meets a MACs budget: score once, decide for any budget in milliseconds.

Units are removed in groups, always the group that costs least saliency per MAC saved at the dimensions of that moment.
That is NViT's rule, remove where S - eta * (saved cost) is lowest, with the exchange rate eta taken as the multiplier
of the budget instead of a constant to tune. Groups form anew at every step from the least important live units of a
vector, and the last group of a vector always stays (arXiv 2110.04869, section 3; the "live" schedule).

The removals of one (scores, dropped blocks) pair are one path, so every budget is a prefix of it.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models import Arch, BlockCut, Cut, UserError
from models.cost import block_macs, stem_macs

from .scores import KINDS, Scores, vector_sizes

__all__ = ["GROUP_SIZES", "WidthPath", "drop_order", "width_path"]

GROUP_SIZES: Mapping[str, int] = {"embed": 16, "heads": 2, "qk": 8, "v": 8, "mlp": 16}  # NViT's


@dataclass(frozen=True)
class WidthPath:
    """A source's narrowing, step by step: after ``t`` steps the model has ``macs[t]`` MACs, strictly falling."""

    arch: Arch
    dropped: frozenset[int]
    order: Mapping[str, tuple[int, ...]]  # units of every vector, least important first
    steps: tuple[tuple[str, int], ...]  # (vector, units removed)
    macs: tuple[int, ...]

    def cut(self, step: int) -> Cut:
        """The decision after ``step`` steps."""
        gone = dict.fromkeys(self.order, 0)
        for name, units in self.steps[:step]:
            gone[name] += units
        kept = {name: tuple(sorted(units[gone[name] :])) for name, units in self.order.items()}
        (stage,) = self.arch.stages
        blocks = []
        for i, block in enumerate(stage.blocks):
            heads, qk, v, mlp = (kept.get(f"blocks.{i}.{kind}") for kind in KINDS[1:])
            if i in self.dropped:
                blocks.append(BlockCut(keep=False))
            elif heads is None or qk is None or v is None:
                blocks.append(BlockCut(mlp=mlp))
            else:
                blocks.append(BlockCut.aligned(block, heads=heads, qk=qk, v=v, mlp=mlp))
        return Cut(embed=(kept["embed"],), blocks=tuple(blocks))

    def step_for(self, macs: float) -> int:
        """The first step with at most ``macs`` MACs. Raises UserError where the floors do not let it be reached."""
        step = bisect.bisect_left(self.macs, -macs, key=lambda m: -m)
        if step == len(self.macs):
            raise UserError(
                f"{macs:,.0f} MACs cannot be reached with {len(self.dropped)} blocks dropped: "
                f"the narrowest model has {self.macs[-1]:,}. Raise the budget, drop more blocks, or use smaller groups"
            )
        return step


def drop_order(scores: Scores) -> tuple[int, ...]:
    """Blocks in the order in which to drop them, from ``score_depth``; all but the last one."""
    depth = scores.vectors["depth"]
    return tuple(int(i) for i in torch.argsort(depth, stable=True)[:-1])


def width_path(
    arch: Arch,
    scores: Scores,
    *,
    dropped: Sequence[int] = (),
    groups: Mapping[str, int] = GROUP_SIZES,
) -> WidthPath:
    """All removals, in order, from ``arch`` without the ``dropped`` blocks down to one group per vector.

    Args:
        arch: the record that was scored.
        scores: a width method's scores of ``arch``.
        dropped: blocks left out before any width is cut.
        groups: units per group of every kind; 0 leaves that kind whole.

    Raises:
        UserError: a vector is missing or has another size, an unknown kind, or a block that does not exist.
    """
    sizes = vector_sizes(arch)
    _check(arch, scores, sizes, dropped, groups)
    live = [name for name in sizes if _block(name) not in dropped]
    order = {name: np.argsort(scores.vectors[name].numpy(), kind="stable") for name in sizes}
    # summed saliency of the least important k units, so that a group's price is a difference
    summed = {name: np.concatenate([[0.0], np.cumsum(scores.vectors[name].numpy()[order[name]])]) for name in live}
    left = {name: sizes[name] for name in live}
    steps: list[tuple[str, int]] = []
    macs = [_macs(arch, left)]
    while removable := [name for name in live if 0 < groups[_kind(name)] < left[name]]:
        gains = _gains(arch, left, groups)
        gone = {name: sizes[name] - left[name] for name in removable}
        price = {n: summed[n][gone[n] + groups[_kind(n)]] - summed[n][gone[n]] for n in removable}
        name = min(removable, key=lambda n: price[n] / gains[n])
        left[name] -= groups[_kind(name)]
        steps.append((name, groups[_kind(name)]))
        macs.append(macs[-1] - gains[name])
    units = {name: tuple(int(u) for u in indices) for name, indices in order.items()}
    return WidthPath(arch, frozenset(dropped), units, tuple(steps), tuple(macs))


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _block(name: str) -> int | None:
    return int(name.split(".")[1]) if name != "embed" else None


def _dims(arch: Arch, left: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Width, heads, qk, v and mlp of every block, as int64 arrays; a dropped block has zeros."""
    blocks = range(len(arch.stages[0].blocks))
    dims = {k: np.array([left.get(f"blocks.{i}.{k}", 0) for i in blocks], dtype=np.int64) for k in KINDS[1:]}
    return {"width": np.full(len(blocks), left["embed"], dtype=np.int64), **dims}


def _macs(arch: Arch, left: Mapping[str, int]) -> int:
    return int(stem_macs(arch, left["embed"]) + block_macs(arch.tokens, **_dims(arch, left)).sum())


def _gains(arch: Arch, left: Mapping[str, int], groups: Mapping[str, int]) -> dict[str, int]:
    """MACs that the removal of one more group from each vector would save, at the present dimensions."""
    dims = _dims(arch, left)
    before = block_macs(arch.tokens, **dims)
    narrower = block_macs(arch.tokens, **{**dims, "width": dims["width"] - groups["embed"]})
    gains = {"embed": int(stem_macs(arch, groups["embed"]) + (before - narrower).sum())}
    for kind in KINDS[1:]:
        saved = before - block_macs(arch.tokens, **{**dims, kind: dims[kind] - groups[kind]})
        gains |= {f"blocks.{i}.{kind}": int(macs) for i, macs in enumerate(saved)}
    return gains


def _check(
    arch: Arch, scores: Scores, sizes: Mapping[str, int], dropped: Sequence[int], groups: Mapping[str, int]
) -> None:
    depth = len(arch.stages[0].blocks)
    for block in dropped:
        if not 0 <= block < depth:
            raise UserError(f"dropped block {block}: the model has blocks 0..{depth - 1}")
    if len(set(dropped)) >= depth:
        raise UserError(f"all {depth} blocks are dropped: at least one must be kept")
    if set(groups) != set(KINDS) or min(groups.values()) < 0:
        raise UserError(f"groups = {dict(groups)}: give a size of at least 0 for each of {', '.join(KINDS)}")
    for name, size in sizes.items():
        vector = scores.vectors.get(name)
        if vector is None or vector.shape != (size,):
            found = "is missing" if vector is None else f"has {vector.numel()} entries"
            raise UserError(f"scores: {name} {found}, the model needs {size}; were they made for another model?")
