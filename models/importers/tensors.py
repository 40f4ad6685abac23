"""Taking a foreign state dict apart, key by key and shape by shape.

Nothing is guessed, and every tensor must be used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.builder import build_with
from prunesweep.models.errors import UserError

__all__ = ["Given", "Tensors", "agree", "check_heads", "one_number_of_heads"]

SHOWN = 6  # keys that a message lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Facts that the user states because the file does not."""

    heads: tuple[int, ...] | None = None
    img_size: tuple[int, int] | None = None
    config: Mapping[str, Any] | None = None
    model: str | None = None


class Tensors:
    """The tensors of a checkpoint that are still to be read, and those of our model made from them (``built``).

    ``left`` holds what has not been taken yet, ``beside`` what the file holds beside its weights.
    """

    def __init__(self, layout: str, weights: Mapping[str, torch.Tensor], beside: Mapping[str, Any]) -> None:
        self.layout, self.left, self.beside = layout, dict(weights), beside
        self.built: dict[str, torch.Tensor] = {}

    def has(self, prefix: str) -> bool:
        """Whether a key begins with ``prefix``."""
        return any(key.startswith(prefix) for key in self.left)

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises UserError unless the tensor exists and has this number of axes, none of them empty.
        """
        if key not in self.left:
            raise UserError(f"the file has no key {key!r}, which layout {self.layout!r} needs; is it another layout?")
        shape = tuple(self.left[key].shape)
        if len(shape) != axes or 0 in shape:
            raise UserError(f"{key} has shape {list(shape)}: layout {self.layout!r} needs {axes} axes, none empty")
        return shape

    def take(self, key: str, *shape: int, why: str = "") -> torch.Tensor:
        """Remove and return a tensor.

        Raises UserError unless it has this shape; ``why`` explains in the message what the shape follows from.
        """
        found = self.shape(key, len(shape))
        if found != shape:
            raise UserError(f"{key} has shape {list(found)}, expected {list(shape)}{why and f' ({why})'}")
        return self.left.pop(key)

    def flags(self, key: str, *shape: int) -> torch.Tensor:
        """Take a mask as bool. Raises UserError where it holds anything but 0 and 1."""
        mask = self.take(key, *shape)
        if not ((mask == 0) | (mask == 1)).all():
            raise UserError(f"{key} is a mask: it must hold 0 and 1 only")
        return mask == 1

    def move(self, key: str, *shape: int, to: str | None = None, why: str = "") -> None:
        """Take a tensor into our model, under its own name or ``to``."""
        self.built[to or key] = self.take(key, *shape, why=why)

    def layer(self, name: str, *shape: int, to: str | None = None, why: str = "") -> None:
        """Move ``name.weight`` of this shape, and ``name.bias`` along its first axis."""
        self.move(f"{name}.weight", *shape, to=f"{to or name}.weight", why=why)
        self.move(f"{name}.bias", shape[0], to=f"{to or name}.bias", why=why)

    def batch_norm(self, name: str, width: int, *, to: str) -> None:
        """Move a BatchNorm with its statistics."""
        self.layer(name, width, to=to)
        for part in ("running_mean", "running_var"):
            self.move(f"{name}.{part}", width, to=f"{to}.{part}")
        self.move(f"{name}.num_batches_tracked", to=f"{to}.num_batches_tracked")

    def discard(self, pattern: str) -> None:
        """Drop every tensor whose whole key matches a pattern; only for tensors without effect."""
        self.left = {key: tensor for key, tensor in self.left.items() if not re.fullmatch(pattern, key)}

    def count(self, prefix: str, *, first: int = 0) -> int:
        """Count the parts ``prefix`` + index. Raises UserError where there is none, or an index is missing."""
        part = re.compile(rf"{re.escape(prefix)}(\d+)\.")
        found = {int(match[1]) for key in self.left if (match := part.match(key))}
        for index in range(first, max(found, default=first) + 1):
            if index not in found:
                raise UserError(f"the file has no keys {prefix}{index}.*, which layout {self.layout!r} needs")
        return len(found)

    def finish(self, arch: Arch) -> nn.Module:
        """Build our model, in eval mode. Raises UserError where tensors are left over, or the record is impossible."""
        if self.left:
            more = f" and {len(self.left) - SHOWN} more" if len(self.left) > SHOWN else ""
            raise UserError(
                f"the file has keys that layout {self.layout!r} does not know: {', '.join(list(self.left)[:SHOWN])}"
                f"{more}; nothing was imported"
            )
        return build_with(arch, self.built).eval()


def agree(what: str, said: Any, found: Any) -> None:
    """Raise UserError where a stated value contradicts the tensors.

    Args:
        what: name of the value, for the message.
        said: the stated value; None where nothing is stated, which agrees with everything.
        found: the value that follows from the tensors.

    Raises:
        UserError: ``said`` is not None and differs from ``found``.
    """
    if said is not None and said != found:
        raise UserError(f"{what} = {said}: the file's tensors say {found}")


def check_heads(what: str, heads: int, width: int) -> int:
    """Return ``heads`` if that many heads can share the attention's width.

    Args:
        what: name of the value, for the message.
        heads: number of heads.
        width: width of the attention, all heads together.

    Raises:
        UserError: ``heads`` is below 1 or does not divide ``width``.
    """
    if heads < 1 or width % heads:
        raise UserError(f"{what} = {heads}: must divide the width of the attention, {width}")
    return heads


def one_number_of_heads(given: Given, width: int, layout: str) -> int:
    """Return the number of heads of every block of a ViT, from what the user states.

    Args:
        given: what the user says; ``heads`` is needed, because the file does not tell.
        width: width of the attention, all heads together.
        layout: name of the layout, for the message.

    Raises:
        UserError: no number of heads, several, or one that does not divide ``width``.
    """
    if given.heads is None:
        hint = f"; heads are usually 64 wide, which would be {width // 64}" if width % 64 == 0 else ""
        raise UserError(f"the file does not say how many heads the attention has: give heads (--heads N){hint}")
    if len(given.heads) != 1:
        raise UserError(f"heads = {list(given.heads)}: layout {layout!r} has one number of heads for all blocks")
    return check_heads("heads", given.heads[0], width)
