"""Draw a token plan: which patches of an image every block keeps, merges and lets pass."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from prunesweep.models import UserError, arch_of, blocks_of
from prunesweep.models.io.files import publish_file

__all__ = ["draw_tokens", "patch_groups"]

TILE = 224  # pixels of the longer side, at least
LABEL, GAP = 14, 6  # pixels above and between tiles
GOLDEN_RATIO = (5**0.5 - 1) / 2  # steps of hue: neighbouring groups look different


def patch_groups(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return, by planned block, the merged token of every patch, (rows, columns) int64; -1 where a patch passes by.

    If all entries of M were trained, a patch belongs to the merged token in which it weighs most.
    """
    arch, groups = arch_of(model), {}
    pairs: Any = zip(blocks_of(model), arch.blocks, strict=True)
    for i, (block, record) in enumerate(pairs):
        if record.tokens is not None:
            M, _, takes_part = block.token_merge.matrices()
            own = torch.where(takes_part, M.detach().abs().argmax(0), -1)
            groups[i] = own[arch.prefix_tokens :].cpu().view(arch.stages[0].grid)
    return groups


def draw_tokens(model: nn.Module, image: Image.Image, out: Path) -> None:
    """Write a PNG with one tile per planned block, in order, at most four in a row.

    A patch that is alone keeps its look. Patches that are merged into one share a colour and an outline. A patch that
    passes the block by is dark.

    Args:
        model: a ViT with token plans.
        image: any image; it is resized to the model's size without keeping its proportions.
        out: the file.

    Raises:
        UserError: the model has no token plan.
    """
    arch, groups = arch_of(model), patch_groups(model)
    if not groups:
        raise UserError(f"{arch.source} has no token plan: there is nothing to draw")
    rows, columns = arch.stages[0].grid
    side = math.ceil(TILE / max(rows, columns))  # pixels of a patch
    photo = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    across = min(4, len(groups))
    width, height = photo.width + GAP, photo.height + LABEL + GAP
    page = Image.new("RGB", (across * width + GAP, math.ceil(len(groups) / across) * height + GAP), "white")
    for place, (i, own) in enumerate(groups.items()):
        x, y = GAP + place % across * width, GAP + place // across * height
        passing = int((own < 0).sum())
        label = f"block {i}: {arch.blocks[i].tokens} of {arch.tokens} tokens, {passing} pass"
        ImageDraw.Draw(page).text((x, y), label, fill="black")
        page.paste(_tile(photo, own.tolist(), side), (x, y + LABEL))
    with publish_file(out) as scratch:
        page.save(scratch, "PNG")


def _tile(photo: Image.Image, groups: list[list[int]], side: int) -> Image.Image:
    """Return the image with one block's groups drawn on it."""
    sizes: dict[int, int] = {}
    for group in (group for row in groups for group in row):
        sizes[group] = sizes.get(group, 0) + 1
    tile = photo.copy()
    draw = ImageDraw.Draw(tile)
    for r, row in enumerate(groups):
        for c, group in enumerate(row):
            box = (c * side, r * side, (c + 1) * side, (r + 1) * side)
            if group < 0:
                tile.paste(Image.blend(photo.crop(box), Image.new("RGB", (side, side), "black"), 0.75), box)
            elif sizes[group] > 1:
                hue = colorsys.hsv_to_rgb(group * GOLDEN_RATIO % 1, 0.9, 1.0)
                colour = Image.new("RGB", (side, side), tuple(round(255 * part) for part in hue))
                tile.paste(Image.blend(photo.crop(box), colour, 0.45), box)
    for r, row in enumerate(groups):  # outlines last, so that no patch covers one
        for c, group in enumerate(row):
            left, top, right, bottom = c * side, r * side, (c + 1) * side, (r + 1) * side
            if c + 1 < len(row) and row[c + 1] != group:
                draw.line((right, top, right, bottom), fill="white")
            if r + 1 < len(groups) and groups[r + 1][c] != group:
                draw.line((left, bottom, right, bottom), fill="white")
    return tile
