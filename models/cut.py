"""Decisions, and the one place where weights are gathered.

Every width method emits a ``Cut``: which channels of the residual stream, of each block's query/key and value heads and
of its MLP stay, and which blocks go. ``cut_arch`` says what the record becomes, ``cut`` gathers the weights. A masked
source and its cut model are the same function; LayerNorm then counts kept channels only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .arch import Arch, Block
from .build import arch_of, build
from .errors import UserError

__all__ = ["BlockCut", "Cut", "cut", "cut_arch"]

Indices = tuple[int, ...]
FORMAT = "prunesweep/cut/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCut:
    """What stays of one block; ``None`` keeps all of it.

    ``qk`` and ``v`` list, for every head that stays, flat channels h·width + j of the block being cut; ``mlp`` lists
    hidden units. Channels are ascending. Both of ``qk`` and ``v`` are given or neither, one entry per remaining head.
    """

    keep: bool = True
    qk: tuple[Indices, ...] | None = None
    v: tuple[Indices, ...] | None = None
    mlp: Indices | None = None

    @classmethod
    def aligned(
        cls, block: Block, *, heads: Sequence[int], qk: Sequence[int], v: Sequence[int], mlp: Sequence[int] | None
    ) -> BlockCut:
        """The same channels ``qk`` and ``v`` kept in every head of ``heads`` (NViT's head alignment)."""
        if not isinstance(block.v, int):
            raise UserError("an aligned cut needs a block whose heads have equal value widths")
        return cls(
            qk=tuple(tuple(h * block.qk + j for j in qk) for h in heads),
            v=tuple(tuple(h * block.v + j for j in v) for h in heads),
            mlp=None if mlp is None else tuple(mlp),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What stays: residual channels (``None`` = all), and one ``BlockCut`` per block in the model's order."""

    embed: Indices | None = None
    blocks: tuple[BlockCut, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is kept whole is left out."""
        blocks = [{k: v for k, v in dataclasses.asdict(b).items() if v is not None} for b in self.blocks]
        return {"format": FORMAT, "embed": self.embed, "blocks": blocks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cut:
        """Read ``to_dict``'s form. Raises UserError for another format."""
        if data.get("format") != FORMAT:
            raise UserError(f"cut.format = {data.get('format')!r}: this version reads {FORMAT!r}")
        blocks = tuple(BlockCut(**{k: _tuples(v) for k, v in block.items()}) for block in data["blocks"])
        return cls(embed=_tuples(data["embed"]), blocks=blocks)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def cut_arch(arch: Arch, decision: Cut) -> Arch:
    """The record of ``cut(model, decision)``. Raises UserError naming the first impossible index."""
    (stage,) = arch.stages
    if len(decision.blocks) != len(stage.blocks):
        raise UserError(f"cut.blocks has {len(decision.blocks)} entries for {len(stage.blocks)} blocks")
    width = stage.width
    if decision.embed is not None:
        _check("cut.embed", decision.embed, stage.width)
        width = len(decision.embed)
    blocks = tuple(
        _cut_block(block, choice, f"cut.blocks[{i}]")
        for i, (block, choice) in enumerate(zip(stage.blocks, decision.blocks, strict=True))
        if choice.keep
    )
    if arch.qk_norm:
        _check_shared_norm(stage.blocks, decision)
    small = dataclasses.replace(arch, stages=(dataclasses.replace(stage, width=width, blocks=blocks),))
    small.validate()
    return small


def _cut_block(block: Block, choice: BlockCut, where: str) -> Block:
    if (choice.qk is None) != (choice.v is None):
        raise UserError(f"{where}: give both qk and v, or neither")
    changes: dict[str, Any] = {}
    if choice.mlp is not None:
        _check(f"{where}.mlp", choice.mlp, block.mlp)
        changes["mlp"] = len(choice.mlp)
    if choice.qk is not None and choice.v is not None:
        if len(choice.qk) != len(choice.v):
            raise UserError(f"{where}: qk has {len(choice.qk)} heads, v has {len(choice.v)}")
        widths = sorted({len(head) for head in choice.qk})
        if len(widths) != 1:
            raise UserError(f"{where}.qk: heads keep different widths {widths}; they must be equal")
        for h, (qk, v) in enumerate(zip(choice.qk, choice.v, strict=True)):
            _check(f"{where}.qk[{h}]", qk, block.heads * block.qk)
            _check(f"{where}.v[{h}]", v, sum(block.v_widths))
        v_widths = tuple(len(head) for head in choice.v)
        changes["heads"], changes["qk"] = len(choice.qk), widths[0]
        changes["v"] = v_widths[0] if len(set(v_widths)) == 1 else v_widths
    return dataclasses.replace(block, **changes)


def _check(where: str, kept: Indices, size: int) -> None:
    if not kept:
        raise UserError(f"{where} is empty: at least one of {size} must stay")
    if any(b <= a for a, b in pairwise(kept)):
        raise UserError(f"{where}: indices must ascend without repetition")
    if kept[0] < 0 or kept[-1] >= size:
        raise UserError(f"{where}: index {kept[0] if kept[0] < 0 else kept[-1]} is outside 0..{size - 1}")


def _check_shared_norm(blocks: Sequence[Block], decision: Cut) -> None:
    """All heads share one q and one k LayerNorm, so they can only lose the same channels."""
    for i, (block, choice) in enumerate(zip(blocks, decision.blocks, strict=True)):
        if choice.keep and choice.qk and len({tuple(c % block.qk for c in head) for head in choice.qk}) > 1:
            raise UserError(f"cut.blocks[{i}].qk: with q/k norm every head must keep the same channels")


def cut(model: nn.Module, decision: Cut) -> nn.Module:
    """The physically small model: ``model``'s weights gathered by ``decision``, in a new module of its own.

    ``model`` is a timm model that ``Arch.from_timm`` accepts, or one of ours; it is not changed. Dtype, device, train
    or eval mode and preprocessing carry over, optimizer state does not.

    Raises:
        UserError: an index does not exist, or nothing would be left.
    """
    arch = arch_of(model)
    small_arch = cut_arch(arch, decision)
    weights = _gather(arch, decision, model.state_dict())
    with torch.device("meta"):  # initial values would only be thrown away
        small = build(small_arch, pretrained_cfg=getattr(model, "pretrained_cfg", None))
    small.load_state_dict(weights, strict=True, assign=True)  # gathering made copies, so nothing is shared
    return small.train(model.training)


def _gather(arch: Arch, decision: Cut, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Index every tensor of a ViT along the axes that the cut shortens; blocks are renumbered."""
    (stage,) = arch.stages
    embed = torch.tensor(decision.embed if decision.embed is not None else range(stage.width))
    kept = [i for i, choice in enumerate(decision.blocks) if choice.keep]
    number = {old: new for new, old in enumerate(kept)}
    rows = {i: _rows(stage.blocks[i], decision.blocks[i]) for i in kept}
    small: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith("blocks."):
            small[name] = _select(tensor, _STEM_AXES[_stem(name)], embed)
            continue
        _, index, part = name.split(".", 2)
        if int(index) in number:
            axes = _block_axes(part, rows[int(index)], embed)
            for axis, chosen in axes:
                tensor = _select(tensor, axis, chosen)
            small[f"blocks.{number[int(index)]}.{part}"] = tensor
    return small


# Where a tensor outside the blocks has its residual channels; None: nowhere.
_STEM_AXES: dict[str, int | None] = {
    "cls_token": -1,
    "dist_token": -1,
    "reg_token": -1,
    "pos_embed": -1,
    "patch_embed": 0,
    "norm_pre": 0,
    "norm": 0,
    "fc_norm": 0,
    "head.weight": 1,
    "head_dist.weight": 1,
    "head.bias": None,
    "head_dist.bias": None,
}


def _stem(name: str) -> str:
    return name if name.startswith("head") else name.split(".")[0]


def _rows(block: Block, choice: BlockCut) -> dict[str, torch.Tensor]:
    """Kept rows of ``qkv``, columns of ``proj``, hidden units, and q/k-norm channels of one block."""
    width = block.heads * block.qk
    qk = choice.qk or tuple(tuple(range(h * block.qk, (h + 1) * block.qk)) for h in range(block.heads))
    flat_qk = torch.tensor([c for head in qk for c in head], dtype=torch.long)
    total_v = sum(block.v_widths)
    flat_v = torch.tensor([c for head in choice.v for c in head] if choice.v else range(total_v), dtype=torch.long)
    return {
        "qkv": torch.cat([flat_qk, width + flat_qk, 2 * width + flat_v]),
        "proj": flat_v,
        "mlp": torch.tensor(choice.mlp if choice.mlp is not None else range(block.mlp), dtype=torch.long),
        "norm": torch.tensor(qk[0] if qk else [], dtype=torch.long) % max(block.qk, 1),
    }


def _block_axes(part: str, rows: Mapping[str, torch.Tensor], embed: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(axis, kept indices) pairs for one tensor of a block."""
    return {
        "norm1.weight": [(0, embed)],
        "norm1.bias": [(0, embed)],
        "norm2.weight": [(0, embed)],
        "norm2.bias": [(0, embed)],
        "ls1.gamma": [(0, embed)],
        "ls2.gamma": [(0, embed)],
        "attn.qkv.weight": [(0, rows["qkv"]), (1, embed)],
        "attn.qkv.bias": [(0, rows["qkv"])],
        "attn.q_norm.weight": [(0, rows["norm"])],
        "attn.q_norm.bias": [(0, rows["norm"])],
        "attn.k_norm.weight": [(0, rows["norm"])],
        "attn.k_norm.bias": [(0, rows["norm"])],
        "attn.proj.weight": [(0, embed), (1, rows["proj"])],
        "attn.proj.bias": [(0, embed)],
        "mlp.fc1.weight": [(0, rows["mlp"]), (1, embed)],
        "mlp.fc1.bias": [(0, rows["mlp"])],
        "mlp.fc2.weight": [(0, embed), (1, rows["mlp"])],
        "mlp.fc2.bias": [(0, embed)],
    }[part]


def _select(tensor: torch.Tensor, axis: int | None, kept: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if axis is None else tensor.index_select(axis, kept.to(tensor.device))
