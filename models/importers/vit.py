"""Shared parts of the ViT layouts: DeiT's names for everything but the attention, and timm's attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError

from .tensors import Given, Tensors, agree

__all__ = ["mlp_and_norms", "timm_attention", "vit_arch"]

# index of a block, width, tokens -> the fields of its record that the mixer and a token plan say
ReadMixer = Callable[[int, int, int], dict[str, Any]]


def vit_arch(tensors: Tensors, given: Given, read_mixer: ReadMixer) -> Arch:
    """Move the tensors of a ViT in DeiT's names and return its record.

    A distillation token makes it a distilled DeiT, whose result is the mean of two classifiers.

    Args:
        tensors: the checkpoint's tensors.
        given: what the user says; ``img_size`` is needed where the patches are no square.
        read_mixer: called with (block, residual width, tokens) for every block; moves the tensors of its mixer and
            returns the mixer's fields of the block's record.

    Raises:
        UserError: a key is missing or has another shape, or ``given.img_size`` does not fit.
    """
    width = tensors.shape("cls_token", 3)[2]
    _, channels, *patch = tensors.shape("patch_embed.proj.weight", 4)
    positions = tensors.shape("pos_embed", 3)[1]
    classes = tensors.shape("head.weight", 2)[0]
    distilled = "dist_token" in tensors.left
    grid = _grid(positions - 1 - distilled, (patch[0], patch[1]), given.img_size)
    tensors.move("cls_token", 1, 1, width)
    tensors.move("pos_embed", 1, positions, width)
    tensors.layer("patch_embed.proj", width, channels, *patch)
    tensors.layer("norm", width)
    tensors.layer("head", classes, width)
    if distilled:
        tensors.move("dist_token", 1, 1, width)
        tensors.layer("head_dist", classes, width)
    blocks = []
    for i in range(tensors.count("blocks.")):
        mixer = read_mixer(i, width, positions)
        blocks.append(Block(src=i, mlp=mlp_and_norms(tensors, f"blocks.{i}", width), **mixer))
    return Arch(
        family="vit",
        source=tensors.layout,
        img_size=given.img_size or (grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=(patch[0], patch[1]),
        in_chans=channels,
        num_classes=classes,
        stages=(Stage(width=width, grid=grid, blocks=tuple(blocks)),),
        dist_token=distilled,
    )


def _grid(patches: int, patch: tuple[int, int], img_size: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of the patches: a square, unless the size of the images says otherwise."""
    if img_size is None:
        side = math.isqrt(max(patches, 0))
        if side == 0 or side * side != patches:
            raise UserError(f"pos_embed is for {patches} patches, which are no square: give img_size (--img-size)")
        return side, side
    grid = img_size[0] // patch[0], img_size[1] // patch[1]
    agree(f"img_size = {list(img_size)}: number of patches", grid[0] * grid[1], patches)
    return grid


def mlp_and_norms(tensors: Tensors, where: str, width: int, *, to: str | None = None) -> int:
    """Move the MLP and the two norms of a block.

    Args:
        tensors: the checkpoint's tensors.
        where: name of the block in the file.
        width: D, the residual width.
        to: name of the block in our model; by default the same.

    Returns:
        The MLP's hidden width.

    Raises:
        UserError: a key is missing or has another shape.
    """
    hidden = tensors.shape(f"{where}.mlp.fc1.weight", 2)[0]
    shapes = {"norm1": (width,), "norm2": (width,), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for name, shape in shapes.items():
        tensors.layer(f"{where}.{name}", *shape, to=f"{to or where}.{name}")
    return hidden


def timm_attention(tensors: Tensors, where: str, width: int, heads: int) -> dict[str, Any]:
    """Move a full-width attention in timm's names.

    Args:
        tensors: the checkpoint's tensors.
        where: name of the block, in the file and in our model.
        width: D, the residual width, which all heads share.
        heads: number of heads; divides ``width``.

    Returns:
        The mixer's fields of the block's record.

    Raises:
        UserError: a key is missing or has another shape.
    """
    tensors.layer(f"{where}.attn.qkv", 3 * width, width)
    tensors.layer(f"{where}.attn.proj", width, width)
    return {"heads": heads, "qk": width // heads, "v": width // heads, "scale": (width // heads) ** -0.5}
