"""Cuts: the form of every method's decision, and the one place where weights are gathered.

Every method emits a ``Cut``: which channels of the residual streams, of each block's query/key and value heads and of
its MLP stay, which blocks go, which mixer takes the place of attention, and which tokens a block gets. They apply in
this order: blocks dropped, widths cut, mixers replaced, tokens planned. ``cut_arch`` gives the record that results,
``cut`` gathers the weights: a decision is a ``Reduction`` of some *spaces*, and every tensor is reduced along each axis
that counts one of them, whatever the family. As far as widths and blocks go, a masked source and its cut model are the
same function; LayerNorm then counts kept channels only.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from types import NoneType
from typing import Any

import torch
from torch import nn

from prunesweep.models.layers.token_merging import TokenPlan

from .arch import Arch, Block, Text
from .builder import adopted, arch_of, build_with, preprocessing_of
from .errors import UserError, nearest
from .families import family_of
from .feature_head import with_feature_head
from .precision import keep_dtype
from .reduction import Choose, Reduction, reduce_tensor
from .replace import replace_block, replace_tensors

__all__ = [
    "BlockCut",
    "Cut",
    "cut",
    "cut_arch",
    "gather",
    "joint_values",
    "replaced",
    "space_reductions",
    "tensor_axes",
]

Indices = tuple[int, ...]
Change = tuple[Block, str | None, TokenPlan | None]
FORMAT = "prunesweep/cut/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCut:
    """The part of a cut that concerns one block: what stays; ``None`` keeps all of it.

    ``qk`` and ``v`` list, for every head that stays, flat channels h·width + j of the block being cut (``qk`` pairs of
    them, where pairs are turned by places); ``mlp`` lists
    hidden units, and without any the MLP is dropped; ``sr`` lists channels of PVTv2's reduced map. Channels are
    ascending. Both of ``qk`` and ``v`` are given or neither, one entry per remaining head; a convolution has ``v``
    alone, with one entry: its own channels. A new head may take channels of several old ones, except in Swin,
    where a head has position biases of its own. ``mixer``
    is one of ``models.replace.REPLACEMENTS``.
    """

    keep: bool = True
    qk: tuple[Indices, ...] | None = None
    v: tuple[Indices, ...] | None = None
    mlp: Indices | None = None
    sr: Indices | None = None
    mixer: str | None = None
    tokens: TokenPlan | None = None

    @classmethod
    def aligned(
        cls, block: Block, *, heads: Sequence[int], qk: Sequence[int], v: Sequence[int], mlp: Sequence[int] | None
    ) -> BlockCut:
        """Keep the same channels ``qk`` and ``v`` in every head of ``heads`` (NViT's head alignment).

        Args:
            block: the record of the block being cut.
            heads: indices of the heads that stay.
            qk: query/key channels that stay, counted within a head.
            v: value channels that stay, counted within a head.
            mlp: hidden units that stay; ``None`` keeps all.

        Raises:
            UserError: the block's heads have unequal value widths.
        """
        if not isinstance(block.v, int):
            raise UserError("an aligned cut needs a block whose heads have equal value widths")
        return cls(
            qk=tuple(tuple(h * block.qk + j for j in qk) for h in heads),
            v=tuple(tuple(h * block.v + j for j in v) for h in heads),
            mlp=None if mlp is None else tuple(mlp),
        )


def joint_values(block: Block, units: Sequence[int]) -> Indices:
    """List the value channels that go with query/key units, where both are scored as one (``attn``).

    Args:
        block: the block's record, whose heads have equally many value channels for every query/key unit.
        units: numbers of units, within a head or of all heads.
    """
    assert isinstance(block.v, int)
    each = block.v // block.qk
    return tuple(unit * each + n for unit in units for n in range(each))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A decision: the residual channels of every stage that stay, and one ``BlockCut`` per block in the model's order.

    ``embed`` is ``None`` where all channels of all stages stay; a stage's entry is ``None`` where all of its own do.
    ``tails`` likewise lists the channels of a language model's word vectors, band by band from the second on; those of
    the first band have the residual channels.
    """

    embed: tuple[Indices | None, ...] | None = None
    blocks: tuple[BlockCut, ...]
    tails: tuple[Indices | None, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form; what is kept whole is left out."""
        blocks = [_block_dict(block) for block in self.blocks]
        whole = {} if self.tails is None else {"tails": self.tails}
        return {"format": FORMAT, "embed": self.embed, "blocks": blocks, **whole}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cut:
        """Read ``to_dict``'s form. Raises UserError for another format, an unknown key or a value of another type."""
        _check_keys(data, ("format", "embed", "blocks", "tails"), "cut")
        if data.get("format") != FORMAT:
            raise UserError(f"cut.format = {data.get('format')!r}: this version reads {FORMAT!r}")
        if not isinstance(data.get("blocks"), (list, tuple)):
            raise UserError(f"cut.blocks = {data.get('blocks')!r}: must be a list")
        blocks = tuple(_read_block(block, f"cut.blocks[{i}]") for i, block in enumerate(data["blocks"]))
        embed, tails = (_read_lists(data.get(name), f"cut.{name}", gaps=True) for name in ("embed", "tails"))
        return cls(embed=embed, blocks=blocks, tails=tails)


def _block_dict(block: BlockCut) -> dict[str, Any]:
    """Return a block's fields without copying every index, as ``dataclasses.asdict`` would."""
    found = {f.name: value for f in dataclasses.fields(block) if (value := getattr(block, f.name)) is not None}
    if block.tokens is not None:
        found["tokens"] = {f.name: getattr(block.tokens, f.name) for f in dataclasses.fields(block.tokens)}
    return found


def _read_block(data: Any, where: str) -> BlockCut:
    _check_keys(data, [field.name for field in dataclasses.fields(BlockCut)], where)
    keep, mixer, plan = data.get("keep", True), data.get("mixer"), data.get("tokens")
    if not isinstance(keep, bool):
        raise UserError(f"{where}.keep = {keep!r}: must be true or false")
    if not isinstance(mixer, (str, NoneType)):
        raise UserError(f"{where}.mixer = {mixer!r}: must be text")
    return BlockCut(
        keep=keep,
        qk=_read_lists(data.get("qk"), f"{where}.qk"),
        v=_read_lists(data.get("v"), f"{where}.v"),
        mlp=_read_indices(data.get("mlp"), f"{where}.mlp"),
        sr=_read_indices(data.get("sr"), f"{where}.sr"),
        mixer=mixer,
        tokens=None if plan is None else TokenPlan.from_dict(plan),
    )


def _check_keys(data: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a JSON object, got {type(data).__name__}")
    for key in data:
        if key not in known:
            raise UserError(
                f"{where} has an unknown key {key!r}; known: {', '.join(known)}. {nearest(key, known)}".strip()
            )


def _read_lists(value: Any, where: str, *, gaps: bool = False) -> Any:
    """A list of lists of indices, or None; with ``gaps`` a list's place may hold None, too."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or (None in value and not gaps):
        raise UserError(f"{where} = {value!r}: must be a list of lists of whole numbers")
    return tuple(_read_indices(part, f"{where}[{i}]") for i, part in enumerate(value))


def _read_indices(value: Any, where: str) -> Indices | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or any(type(index) is not int for index in value):
        raise UserError(f"{where} = {value!r}: must be a list of whole numbers")
    return tuple(value)


def cut_arch(arch: Arch, decision: Cut) -> Arch:
    """Derive the record of ``cut(model, decision)``.

    Args:
        arch: the model's record.
        decision: the cut, with one entry per block of ``arch``.

    Raises:
        UserError: an index does not exist (the message names the first), or nothing would be left.
    """
    if len(decision.blocks) != arch.depth:
        raise UserError(f"cut.blocks has {len(decision.blocks)} entries for {arch.depth} blocks")
    embed = _embed(arch, decision)
    stages, choices = [], iter(enumerate(decision.blocks))
    for s, stage in enumerate(arch.stages):
        if embed[s] is not None:
            _check(f"cut.embed[{s}]", embed[s], stage.width)
        width = stage.width if embed[s] is None else len(embed[s])
        pairs = [(block, *next(choices)) for block in stage.blocks]
        blocks = tuple(_cut_block(arch, block, choice, f"cut.blocks[{i}]") for block, i, choice in pairs if choice.keep)
        stages.append(dataclasses.replace(stage, width=width, blocks=blocks))
    small = dataclasses.replace(arch.with_stages(tuple(stages)), text=_cut_text(arch, decision))
    small.validate()
    return small


def _cut_text(arch: Arch, decision: Cut) -> Text | None:
    if decision.tails is None:
        return arch.text
    widths = () if arch.text is None else arch.text.tails
    if arch.text is None or len(decision.tails) != len(widths):
        raise UserError(f"cut.tails has {len(decision.tails)} entries for {len(widths)} tails")
    for j, (kept, width) in enumerate(zip(decision.tails, widths, strict=True)):
        if kept is not None:
            _check(f"cut.tails[{j}]", kept, width)
    left = (width if kept is None else len(kept) for kept, width in zip(decision.tails, widths, strict=True))
    return dataclasses.replace(arch.text, tails=tuple(left))


def _embed(arch: Arch, decision: Cut) -> tuple[Any, ...]:
    if decision.embed is None:
        return (None,) * len(arch.stages)
    if len(decision.embed) != len(arch.stages):
        raise UserError(f"cut.embed has {len(decision.embed)} entries for {len(arch.stages)} stages")
    return decision.embed


def _cut_block(arch: Arch, block: Block, choice: BlockCut, where: str) -> Block:
    narrow = _narrow_block(arch, block, choice, where)
    return replace_block(arch, narrow, choice.mixer, choice.tokens, where)


def _narrow_block(arch: Arch, block: Block, choice: BlockCut, where: str) -> Block:
    changes: dict[str, Any] = {}
    for name, kept in (("mlp", choice.mlp), ("sr", choice.sr)):
        if kept is not None:
            if kept or name != "mlp":
                _check(f"{where}.{name}", kept, getattr(block, name))
            changes[name] = len(kept)
    if block.convolves:
        if choice.qk is not None or (choice.v is not None and len(choice.v) != 1):
            raise UserError(f"{where}: a convolution takes v alone, with one entry: its channels that stay")
        if choice.v is not None:
            _check(f"{where}.v[0]", choice.v[0], block.total_v)
            changes["v"] = len(choice.v[0])
    elif block.mixer not in ("attn", "xca") and (choice.qk is not None or choice.v is not None):
        raise UserError(f"{where}: a block of mixer {block.mixer!r} takes neither qk nor v: there are no heads")
    elif choice.qk is not None and choice.v is not None:
        changes |= _cut_heads(arch, block, choice.qk, choice.v, where)
    elif choice.qk is not None or choice.v is not None:
        raise UserError(f"{where}: give both qk and v, or neither")
    return dataclasses.replace(block, **changes)


def _cut_heads(arch: Arch, block: Block, qk: tuple[Indices, ...], v: tuple[Indices, ...], where: str) -> dict[str, Any]:
    if len(qk) != len(v):
        raise UserError(f"{where}: qk has {len(qk)} heads, v has {len(v)}")
    widths = sorted({len(head) for head in qk})
    if len(widths) != 1:
        raise UserError(f"{where}.qk: heads keep different widths {widths}; they must be equal")
    family = family_of(arch)
    mixed = family.supports("mixed_heads")
    for h, (own_qk, own_v) in enumerate(zip(qk, v, strict=True)):
        _check(f"{where}.qk[{h}]", own_qk, block.heads * block.qk)
        _check(f"{where}.v[{h}]", own_v, block.total_v)
        if not mixed and len({c // block.qk for c in own_qk} | _heads_of(block, own_v)) > 1:
            raise UserError(f"{where}.qk[{h}]: {family.one_head_only}; keep channels of one head")
        if block.mixer == "xca" and (len(own_qk) < block.qk or own_v != own_qk):
            raise UserError(f"{where}.qk[{h}]: {family.one_head_only}; keep all channels of the head, as qk and as v")
    if arch.qk_norm and len({tuple(c % block.qk for c in head) for head in qk}) > 1:
        # all heads share one q and one k LayerNorm
        raise UserError(f"{where}.qk: with q/k norm every head must keep the same channels")
    v_widths = tuple(len(head) for head in v)
    return {"heads": len(qk), "qk": widths[0], "v": v_widths[0] if len(set(v_widths)) == 1 else v_widths}


def _heads_of(block: Block, v: Indices) -> set[int]:
    """Return the heads that value channels belong to."""
    ends = list(accumulate(block.v_widths))
    return {bisect.bisect_right(ends, c) for c in v}


def _check(where: str, kept: Indices, size: int) -> None:
    if not kept:
        raise UserError(f"{where} is empty: at least one of {size} must stay")
    if any(b <= a for a, b in pairwise(kept)):
        raise UserError(f"{where}: indices must ascend without repetition")
    if kept[0] < 0 or kept[-1] >= size:
        raise UserError(f"{where}: index {kept[0] if kept[0] < 0 else kept[-1]} is outside 0..{size - 1}")


def cut(model: nn.Module, decision: Cut) -> nn.Module:
    """Make the physically small model: ``model``'s weights gathered by ``decision``, in a new module of its own.

    Dtype, device, train or eval mode and preprocessing carry over, optimizer state does not.

    Args:
        model: a timm model that ``Arch.from_timm`` accepts, or one of ours; it is not changed.
        decision: the cut, with one entry per block of ``model``.

    Raises:
        UserError: an index does not exist, or nothing would be left.
    """
    model = adopted(model)
    small_arch = cut_arch(arch_of(model), decision)
    if small_arch.feature_head:
        model = with_feature_head(model)
    arch = arch_of(model)
    keep, reductions = [choice.keep for choice in decision.blocks], space_reductions(arch, decision)
    weights = gather(arch, keep, reductions, model.state_dict())  # gathering makes copies, so nothing is shared
    weights = replaced(arch, [_change(arch, i, decision.blocks[i]) for i in range(arch.depth)], weights)
    small = build_with(small_arch, weights, pretrained_cfg=preprocessing_of(model))
    keep_dtype(small, model)
    return small.train(model.training)


def tensor_axes(arch: Arch, name: str) -> tuple[str, ...]:
    """Name what each axis of a tensor of ``build(arch)``'s state dict counts.

    ``stages.S.embed`` are a stage's residual channels and ``stages.S.merged`` those of four neighbours side by side
    (Swin's patch merging); of block I there are ``blocks.I.`` and ``q`` (H·E), ``qkv`` (all of Q, K, V), ``kv``, ``v``
    (all heads' value channels, or a convolution's bottleneck), ``heads``, ``qk_norm`` (E), ``mlp`` and ``sr``. Of a
    language model's bands from the second on there is ``bands.B.tail``, the channels of their words.

    Args:
        arch: the model's record.
        name: the tensor's name in the state dict.

    Returns:
        One name per axis; "" or left out where the axis is never cut.
    """
    return family_of(arch).axes(arch, name)


def gather(
    arch: Arch, keep: Sequence[bool], reductions: Mapping[str, Reduction], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Reduce every tensor along the axes of spaces that are reduced; number blocks anew within their stage.

    Args:
        arch: the record of the model.
        keep: of every block, whether it stays.
        reductions: by space; spaces that are left out stay whole.
        weights: the model's state dict.

    Returns:
        New tensors, by their names in the small model's state dict.
    """
    family, choices = family_of(arch), iter(keep)
    left: dict[tuple[int, int], int] = {}  # (stage, block) -> the block's new number in its stage
    for s, stage in enumerate(arch.stages):
        alive = [b for b in range(len(stage.blocks)) if next(choices)]
        left |= {(s, b): new for new, b in enumerate(alive)}
    sizes = family.spaces(arch)
    small: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        new, place = name, family.place(name)
        if place is not None:
            if (place.stage, place.block) not in left:
                continue
            new = family.block_prefix(place.stage, left[place.stage, place.block]) + place.part
        spaces = [family.parts(axis) for axis in family.axes(arch, name)]
        small[new] = reduce_tensor(tensor, spaces, sizes, reductions)
    return small


def space_reductions(arch: Arch, decision: Cut) -> dict[str, Reduction]:
    """Turn a cut into reductions of the spaces that it shortens.

    Args:
        arch: the record of the model being cut.
        decision: the cut.

    Returns:
        By space (see ``Family.spaces``), its reduction; spaces that stay whole are left out.
    """
    found: dict[str, Reduction] = {}
    for s, channels in enumerate(_embed(arch, decision)):
        if channels is not None:
            found[f"stages.{s}.embed"] = Choose(channels)
    for i, (block, choice) in enumerate(zip(arch.blocks, decision.blocks, strict=True)):
        if choice.keep:
            found |= {f"blocks.{i}.{space}": Choose(indices) for space, indices in _chosen(block, choice).items()}
    for b, channels in enumerate(decision.tails or (), start=1):
        if channels is not None:
            found[f"bands.{b}.tail"] = Choose(channels)
    return found


def _chosen(block: Block, choice: BlockCut) -> dict[str, Indices]:
    """Return the indices that stay of every space of one block that the cut shortens."""
    chosen: dict[str, Indices] = {}
    if choice.qk is not None:
        channels = tuple(chain.from_iterable(choice.qk))
        chosen |= {"q": channels, "k": channels}
        chosen["heads"] = tuple(head[0] // block.qk for head in choice.qk)
        chosen["qk_norm"] = tuple(c % block.qk for c in choice.qk[0])
    if choice.v is not None:
        chosen["v"] = tuple(chain.from_iterable(choice.v))
    own = (("mlp", choice.mlp), ("sr", choice.sr))
    return chosen | {space: indices for space, indices in own if indices}


def _change(arch: Arch, i: int, choice: BlockCut) -> Change | None:
    if not choice.keep:
        return None
    return _narrow_block(arch, arch.blocks[i], choice, f"cut.blocks[{i}]"), choice.mixer, choice.tokens


def replaced(
    arch: Arch, changes: Sequence[Change | None], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Give blocks their new mixers and token plans, and take away the MLPs that they no longer have.

    Args:
        arch: the record of the model that was narrowed.
        changes: of each of its blocks, the record of the narrowed block with its attention, and what
            ``models.replace.replace_tensors`` takes as mixer and plan; ``None`` for a block that is gone.
        weights: the narrowed model's state dict, as ``gather`` returns it.
    """
    family, found, rest = family_of(arch), dict(weights), iter(changes)
    for s, stage in enumerate(arch.stages):
        alive = [change for change in islice(rest, len(stage.blocks)) if change is not None]
        for b, (narrow, mixer, plan) in enumerate(alive):
            if mixer is None and plan is None and narrow.mlp:
                continue
            prefix = family.block_prefix(s, b)
            own = {name.removeprefix(prefix): found.pop(name) for name in list(found) if name.startswith(prefix)}
            new = replace_tensors(arch, narrow, own, mixer, plan)
            found |= {prefix + name: tensor for name, tensor in new.items()}
    return found
