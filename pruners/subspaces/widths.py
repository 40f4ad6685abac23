"""Widths of the small model, and the record that follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from prunesweep.models import Arch, UserError
from prunesweep.models.arch import Block
from prunesweep.models.families import family_of
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.models.replace import replace_block

__all__ = ["BlockWidths", "Widths", "can_narrow", "can_project", "compressed_arch", "equal_shares", "narrow_block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWidths:
    """Ranks and units of one block, and what takes its attention's place; ``None`` keeps what the source has.

    Args:
        keep: ``False`` drops the block.
        mixer: in place of attention: ``"conv1x1"`` or ``"conv3x3"``, or ``"none"``, which drops this half of the block.
        mlp_half: ``False`` drops this half of the block.
        qk: query/key rank of every head.
        v: value rank of every head, or one per head; of a convolution, its bottleneck channels.
        mlp: hidden units.
        sr: channels of PVTv2's reduced map.
        tokens: which tokens the block works on.
    """

    keep: bool = True
    mixer: str | None = None
    mlp_half: bool = True
    qk: int | None = None
    v: int | tuple[int, ...] | None = None
    mlp: int | None = None
    sr: int | None = None
    tokens: TokenPlan | None = None


Embed = int | tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Residual widths, and the widths of every block of the source in order.

    Args:
        embed: residual width of every stage, or that of the only one; ``None`` keeps what the source has.
        blocks: one entry per block of the source.
    """

    embed: Embed = None
    blocks: tuple[BlockWidths, ...]

    @classmethod
    def uniform(
        cls,
        arch: Arch,
        *,
        embed: Embed = None,
        qk: int | None = None,
        v: int | None = None,
        mlp: int | None = None,
        drop: Iterable[int] = (),
    ) -> Widths:
        """Give every block the same ranks and units.

        Args:
            arch: the source's record.
            embed, qk, v, mlp: as in ``Widths`` and ``BlockWidths``.
            drop: indices of the blocks that go.
        """
        gone = set(drop)
        return cls(
            embed=embed, blocks=tuple(BlockWidths(keep=i not in gone, qk=qk, v=v, mlp=mlp) for i in range(arch.depth))
        )


def can_project(arch: Arch, space: str) -> bool:
    """Whether a space of a source may be mapped onto a subspace, as its family says.

    A stream that RMSNorms read is not: the maps of streams keep the mean, as LayerNorm needs it.
    """
    if arch.norm != "layer" and space.endswith(".embed"):
        return False
    return "project" in family_of(arch).reductions(arch, space)


def can_narrow(arch: Arch, space: str) -> bool:
    """Whether a space of queries, keys or values may be made smaller here.

    That is where it can be projected, and where a unit is a pair of channels: pairs are chosen.

    Args:
        arch: the source's record.
        space: ``blocks.I.q``, ``blocks.I.k`` or ``blocks.I.v``.
    """
    return can_project(arch, space) or (arch.qk_rows == 2 and not space.endswith(".v"))


def equal_shares(arch: Arch, share: float, align: int = 1) -> Widths:
    """Take the same share of every width of a source.

    Args:
        arch: the source's record.
        share: of the residual width, of ranks and of hidden units, above 0 and at most 1.
        align: widths below the full one are multiples of it.
    """

    def part(full: int, least: int = 1) -> int:
        return min(full, max(least, align, round(full * share / align) * align))

    blocks = tuple(
        BlockWidths(
            qk=part(block.qk) if block.mixer == "attn" and can_narrow(arch, f"blocks.{i}.q") else None,
            v=tuple(part(v) for v in block.v_widths)
            if block.mixer == "attn" and can_narrow(arch, f"blocks.{i}.v")
            else None,
            mlp=part(block.mlp) if block.mlp else None,
            sr=part(block.sr) if block.sr else None,
        )
        for i, block in enumerate(arch.blocks)
    )
    return Widths(embed=tuple(part(stage.width, 2) for stage in arch.stages), blocks=blocks)


def compressed_arch(arch: Arch, widths: Widths) -> Arch:
    """Make the record of the small model: that of a chosen cut of the same widths, so its cost is the same too.

    Args:
        arch: the source's record.
        widths: of the small model.

    Raises:
        UserError: a width is larger than the source's or below 1, this space of the source cannot be projected, or a
            block cannot have this mixer or these tokens.
    """
    if len(widths.blocks) != arch.depth:
        raise UserError(f"widths.blocks has {len(widths.blocks)} entries, {arch.source} has {arch.depth} blocks")
    stages, own = [], iter(enumerate(widths.blocks))
    for stage, width in zip(arch.stages, _stream_widths(arch, widths.embed), strict=True):
        pairs = [next(own) for _ in stage.blocks]
        blocks = tuple(_block(arch, i, block) for i, block in pairs if block.keep)
        stages.append(dataclasses.replace(stage, width=width, blocks=blocks))
    small = arch.with_stages(tuple(stages))
    small.validate()
    return small


def _stream_widths(arch: Arch, embed: Embed) -> list[int]:
    """Fill in the residual widths that stay, and check all."""
    full = [stage.width for stage in arch.stages]
    if embed is None:
        return full
    if isinstance(embed, int):
        if len(full) > 1:
            raise UserError(f"widths.embed = {embed}: {arch.source} has {len(full)} stages; give a width for each")
        _check("widths.embed", embed, full[0], least=2)
        return [embed]
    if len(embed) != len(full):
        raise UserError(f"widths.embed has {len(embed)} entries, {arch.source} has {len(full)} stages")
    for s, (width, most) in enumerate(zip(embed, full, strict=True)):
        if width is not None:
            _check(f"widths.embed[{s}]", width, most, least=2)
    return [most if width is None else width for width, most in zip(embed, full, strict=True)]


def _block(arch: Arch, i: int, own: BlockWidths) -> Block:
    where = f"widths.blocks[{i}]"
    if own.mixer == "norm":
        raise UserError(f"{where}.mixer = 'norm': a norm in the place of attention cannot be fitted; use 'none'")
    return replace_block(arch, narrow_block(arch, i, own), own.mixer, own.tokens, where)


def narrow_block(arch: Arch, i: int, own: BlockWidths) -> Block:
    """Make the record of block ``i`` of a source with its own mixer and all tokens, in the widths of ``own``.

    Raises:
        UserError: a width is larger than the source's or below 1, or this space of the source cannot be projected.
    """
    block, where, changes = arch.blocks[i], f"widths.blocks[{i}]", dict[str, object]()
    if block.mixer == "attn" and own.mixer != "none":
        qk = block.qk if own.qk is None or own.mixer is not None else own.qk
        _check(f"{where}.qk", qk, block.qk)
        if qk < block.qk and not can_narrow(arch, f"blocks.{i}.q"):
            raise UserError(f"{where}.qk = {qk}: {family_of(arch).only_chosen(arch, f'blocks.{i}.q')} of {arch.source}")
        changes["qk"] = qk
        v = own.v if isinstance(own.v, tuple) else (own.v,) * block.heads
        if len(v) != block.heads:
            raise UserError(f"{where}.v has {len(v)} entries for {block.heads} heads")
        kept = tuple(full if rank is None else rank for rank, full in zip(v, block.v_widths, strict=True))
        for rank, full in zip(kept, block.v_widths, strict=True):
            _check(f"{where}.v", rank, full)
        if (
            own.mixer is None
            and kept != block.v_widths
            and (reason := family_of(arch).only_chosen(arch, f"blocks.{i}.v"))
        ):
            raise UserError(f"{where}.v = {own.v}: {reason} of {arch.source}")
        changes["v"] = kept[0] if len(set(kept)) == 1 else kept
        if own.sr is not None:
            _check(f"{where}.sr", own.sr, block.sr)
            changes["sr"] = own.sr
    mlp = (block.mlp if own.mlp is None else own.mlp) if own.mlp_half else 0
    if block.mlp and own.mlp_half:
        _check(f"{where}.mlp", mlp, block.mlp)
    return dataclasses.replace(block, mlp=mlp, **changes)  # type: ignore[arg-type]


def _check(where: str, width: int, full: int, least: int = 1) -> None:
    if not least <= width <= full:
        raise UserError(f"{where} = {width}: must lie in {least}..{full}")
