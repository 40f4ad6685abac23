"""What no decision may touch: whole blocks, or kinds of units, everywhere or in some blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from prunesweep.models import Arch, UserError
from prunesweep.models.errors import nearest

from .ranked import GROUP_SIZES

__all__ = ["EXAMPLE", "Protection"]

EXAMPLE = "blocks=0,11, mlp=0,1, heads or embed"
OF_STREAMS = ("embed", "tail")  # kinds that no block has for itself
REACH = {"dim": ("dim", "qk", "v"), "qk": ("qk", "dim"), "v": ("v", "dim")}  # "dim" is a channel of all three
ATTENTION = ("heads", "qk", "v", "dim", "sr")


@dataclass(frozen=True)
class Protection:
    """Blocks whose heads, widths, mixer and tokens stay, and that are not dropped; and kinds of units that stay.

    The residual stream is shared by all blocks, so it is protected by itself, as ``embed``.

    Args:
        texts: as they were given.
        blocks: indices of whole blocks.
        spaces: by kind of units, the blocks in which they stay; None: in all that stay themselves.
    """

    texts: tuple[str, ...] = ()
    blocks: frozenset[int] = frozenset()
    spaces: Mapping[str, frozenset[int] | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Iterable[str], key: str = "protect") -> Protection:
        """Read ``blocks=I,J``, ``KIND=I,J`` or ``KIND``.

        Args:
            texts: one for each.
            key: what they were given by, for messages.

        Raises:
            UserError: a kind is unknown, or what follows is no list of blocks.
        """
        given, blocks, spaces = tuple(texts), frozenset[int](), dict[str, frozenset[int] | None]()
        for text in given:
            kind, equals, numbers = text.partition("=")
            kind = kind.strip()
            if kind != "blocks" and kind not in GROUP_SIZES:
                known = ("blocks", *GROUP_SIZES)
                raise UserError(
                    f"{key} {text}: {kind!r} is none of {', '.join(known)}. {nearest(kind, known)}".rstrip()
                )
            parts = [part.strip() for part in numbers.split(",")]
            if (equals and not all(map(str.isdecimal, parts))) or (kind == "blocks" and not equals):
                raise UserError(f"{key} {text}: must be like {EXAMPLE}, with blocks counted from 0")
            if equals and kind in OF_STREAMS:
                raise UserError(f"{key} {text}: no block has {kind} for itself; give {kind} alone")
            own = frozenset(map(int, parts)) if equals else None
            if kind == "blocks":
                blocks |= own or frozenset()
            elif own is None or spaces.get(kind, own) is None:
                spaces[kind] = None
            else:
                spaces[kind] = own | (spaces.get(kind) or frozenset())
        return cls(given, blocks, spaces)

    def __bool__(self) -> bool:
        return bool(self.texts)

    def check(self, arch: Arch, key: str = "protect") -> None:
        """Raise UserError where a block does not exist.

        Args:
            arch: the source's record.
            key: what the protection was given by, for the message.
        """
        named = self.blocks.union(*(own for own in self.spaces.values() if own is not None))
        if named and max(named) >= arch.depth:
            raise UserError(f"{key}: there is no block {max(named)}; {arch.source} has blocks 0..{arch.depth - 1}")

    def _has(self, kinds: Iterable[str], block: int, *, named: bool = False) -> bool:
        """Whether one of some kinds stays in a block; with ``named``, only where the block is given by its number."""
        found = (self.spaces.get(kind, frozenset()) for kind in kinds)
        return any(not named if own is None else block in own for own in found)

    def stays(self, block: int) -> bool:
        """Whether a block must not be dropped: it, or a kind of its units, is named."""
        return block in self.blocks or self._has(self.spaces, block, named=True)

    def keeps_attention(self, block: int) -> bool:
        """Whether a block's attention must not be replaced."""
        return block in self.blocks or self._has(ATTENTION, block)

    def keeps_mlp(self, block: int) -> bool:
        """Whether a block's MLP must not be dropped."""
        return block in self.blocks or self._has(("mlp",), block)

    def keeps_tokens(self, block: int) -> bool:
        """Whether a block must work on all tokens that reach it."""
        return block in self.blocks

    def keeps(self, vector: str) -> bool:
        """Whether the units of a vector of scores (``blocks.3.mlp``, ``stages.0.embed``) stay."""
        where, place, kind = vector.split(".")
        if where != "blocks":
            return kind in self.spaces
        return int(place) in self.blocks or self._has(REACH.get(kind, (kind,)), int(place))

    def with_heads(self) -> Protection:
        """Protect heads too where queries, keys or values are: projection shares out what is left among all heads."""
        narrow = [self.spaces[kind] for kind in ("heads", "qk", "v", "dim") if kind in self.spaces]
        if not narrow:
            return self
        numbered = [own for own in narrow if own is not None]
        heads = None if len(numbered) < len(narrow) else frozenset[int]().union(*numbered)
        return replace(self, spaces={**self.spaces, "heads": heads})

    def broken(self, source: Arch, small: Arch) -> str | None:
        """Say what of a smaller model is not as in its source; None where all that is protected is.

        Args:
            source: the record of the source.
            small: that of a model made from it.
        """
        own = {block.src: block for block in small.blocks}
        for i, block in enumerate(source.blocks):
            now = own.get(block.src)
            if now is None:
                if self.stays(i):
                    return f"block {i} is dropped"
                continue
            for kind in ("heads", "qk", "v", "mlp", "sr"):
                if self.keeps(f"blocks.{i}.{kind}") and getattr(now, kind) != getattr(block, kind):
                    return f"block {i} has {kind} {getattr(now, kind)}, the source {getattr(block, kind)}"
            if self.keeps_attention(i) and now.mixer != block.mixer:
                return f"block {i} has the mixer {now.mixer}, the source {block.mixer}"
            if self.keeps_tokens(i) and now.tokens != block.tokens:
                return f"block {i} works on {now.tokens} tokens"
        if "embed" in self.spaces and [s.width for s in small.stages] != [s.width for s in source.stages]:
            return f"the residual stream is {small.stages[0].width} wide, the source's {source.stages[0].width}"
        return None
