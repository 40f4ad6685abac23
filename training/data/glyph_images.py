"""Draw images of single characters from the outlines in font files, the same pixels on every machine.

No font rasteriser is involved, whose versions differ: outlines are read as numbers, made polygons and filled here. Only
integers and single sums, products, quotients and roots of IEEE floats are computed, in a fixed order; rotations are
rational. Random numbers are bits of PCG64, a stream that NumPy keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

__all__ = ["PIXELS", "SLOTS", "distance_maps", "draw_images"]

PIXELS = 32  # rows and columns of an image
GRID = 96  # rows and columns of a distance map
EM = 64  # of them are the font's em: the rest is room for wide characters, and for the distance around them
REACH = 10.0  # cells from the outline up to which distances are kept
STEPS = 8  # lines that a curve becomes
SLOTS = 35  # random numbers that an image uses, beside those of its noise
CHUNK = 512  # images drawn at a time

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def distance_maps(fonts: Sequence[Path], characters: str) -> npt.NDArray[np.int8]:
    """Return how far every place is from the outline of every character in every font.

    Args:
        fonts: font files with TrueType outlines, all of which have the characters.
        characters: what to draw; each is centred by its own extent, at the size that its font gives it.

    Returns:
        (fonts, characters, GRID, GRID) int8: positive inside; 127 is ``REACH`` cells of the grid, or farther.
    """
    from fontTools.ttLib import TTFont

    maps = np.empty((len(fonts), len(characters), GRID, GRID), dtype=np.int8)
    for own, path in zip(maps, fonts, strict=True):
        with TTFont(path, lazy=True) as font:
            for number, character in enumerate(characters):
                own[number] = _distances(_filled(_lines(font, character)))
    return maps


def _lines(font: TTFont, character: str) -> npt.NDArray[np.float64]:
    """Return a character's outline as lines (n, 2, 2), from and to (x, y), in cells of the grid, y downwards."""
    from fontTools.pens.basePen import BasePen

    class Lines(BasePen):  # type: ignore[misc]  # fontTools has no types here
        """Collect the closed contours as points."""

        def __init__(self, glyphs: Any) -> None:
            super().__init__(glyphs)
            self.contours: list[list[tuple[float, float]]] = []

        def _moveTo(self, pt: tuple[float, float]) -> None:  # noqa: N802
            self.contours.append([pt])

        def _lineTo(self, pt: tuple[float, float]) -> None:  # noqa: N802
            self.contours[-1].append(pt)

        def _qCurveToOne(self, pt1: tuple[float, float], pt2: tuple[float, float]) -> None:  # noqa: N802
            (ax, ay), (bx, by), (cx, cy) = self.contours[-1][-1], pt1, pt2
            for step in range(1, STEPS + 1):
                t = step / STEPS  # a multiple of 1/8: its products are exact
                s = 1 - t
                x = s * s * ax + 2 * s * t * bx + t * t * cx
                self.contours[-1].append((x, s * s * ay + 2 * s * t * by + t * t * cy))

    glyphs = font.getGlyphSet()
    pen = Lines(glyphs)
    glyphs[font.getBestCmap()[ord(character)]].draw(pen)
    closed = [np.array([*contour, contour[0]]) for contour in pen.contours]
    lines = np.concatenate([np.stack([c[:-1], c[1:]], axis=1) for c in closed])
    points = lines.reshape(-1, 2)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    scale = EM / font["head"].unitsPerEm
    return (lines - middle) * np.array([scale, -scale]) + GRID / 2


def _filled(lines: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which cells' centres are inside, by the non-zero rule: (GRID, GRID), rows first."""
    winding = np.zeros((GRID, GRID + 1), dtype=np.int64)
    rows = np.arange(GRID)[:, None] + 0.5
    (x0, y0), (x1, y1) = lines[:, 0].T, lines[:, 1].T
    down, up = (y0 <= rows) & (y1 > rows), (y1 <= rows) & (y0 > rows)
    row, line = np.nonzero(down | up)
    at = x0[line] + (row + 0.5 - y0[line]) / (y1[line] - y0[line]) * (x1[line] - x0[line])
    column = np.clip(np.ceil(at - 0.5), 0, GRID).astype(np.int64)  # the first whose centre is to the right
    np.add.at(winding, (row, column), np.where(down[row, line], 1, -1))
    return winding[:, :-1].cumsum(axis=1) != 0


def _distances(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    from scipy.ndimage import distance_transform_edt

    signed = distance_transform_edt(inside) - distance_transform_edt(~inside)
    signed -= np.sign(signed) * 0.5  # the outline is between the cells
    return np.rint(np.clip(signed * (127 / REACH), -127, 127)).astype(np.int8)


def draw_images(maps: npt.NDArray[np.int8], per_character: int, seed: int) -> tuple[U8, npt.NDArray[np.int64]]:
    """Draw as many images of every character, each by random numbers of its own.

    Every image has its character in the middle, in a random font, turned, sheared, scaled, moved, made thicker or
    thinner, of random contrast, on a background that slopes, with two other characters reaching in from
    the edges, and noise over all of it.

    Args:
        maps: distances of ``distance_maps``.
        per_character: images of every character.
        seed: another seed gives other images.

    Returns:
        Images (N, PIXELS, PIXELS) uint8, and the characters' numbers (N,) int64: 0, 1, 2, ... again and again, so that
        fewer images are the first ones of more.
    """
    characters = maps.shape[1]
    labels = np.tile(np.arange(characters), per_character)
    images = np.empty((len(labels), PIXELS, PIXELS), dtype=np.uint8)
    places, noises = (np.random.PCG64(np.random.SeedSequence([seed, own])) for own in (0, 1))
    for begin in range(0, len(labels), CHUNK):
        own = labels[begin : begin + CHUNK]
        uniform = (places.random_raw(len(own) * SLOTS) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
        noise = noises.random_raw(len(own) * PIXELS * PIXELS // 2).view(np.uint8).reshape(len(own), PIXELS, PIXELS, 4)
        images[begin : begin + CHUNK] = _drawn(maps, own, uniform.reshape(len(own), SLOTS).T, noise)
    return images, labels


def _drawn(maps: npt.NDArray[np.int8], labels: npt.NDArray[np.int64], uniform: F32, noise: U8) -> U8:
    """Draw the images of some labels by their random numbers in [0, 1), (SLOTS, n), and bytes (n, rows, columns, 4)."""
    slots = iter(uniform[:, :, None, None])

    def between(low: float, high: float) -> F32:
        return np.float32(low) + np.float32(high - low) * next(slots)

    def one_of(count: int) -> npt.NDArray[np.int64]:
        return (next(slots) * np.float32(count)).astype(np.int64)

    y, x = (a.astype(np.float32)[None] - np.float32((PIXELS - 1) / 2) for a in np.mgrid[:PIXELS, :PIXELS])
    shade = between(0.1, 0.4) + (between(-0.2, 0.2) * x + between(-0.2, 0.2) * y) / np.float32(PIXELS)
    contrast = between(0.25, 0.7)
    for clutter in (True, True, False):  # the character itself is on top
        if clutter:
            which, far = one_of(maps.shape[1]), between(15, 21)
            side, along = one_of(4), between(-14, 14)
            dx = np.where(side == 0, far, np.where(side == 1, -far, along))
            dy = np.where(side == 2, far, np.where(side == 3, -far, along))
        else:
            which, dx, dy = labels[:, None, None], between(-2.5, 2.5), between(-2.5, 2.5)
        cover = _covered(maps, one_of(maps.shape[0]), which, x - dx, y - dy, between)
        shade = shade + cover * (contrast * between(0.3, 0.9) if clutter else contrast)
    strength = between(0.02, 0.12)
    # the sum of four uniform bytes is nearly normal; its standard deviation is 147.8
    shade = shade + (noise.astype(np.int32).sum(axis=-1) - 510).astype(np.float32) * (strength / np.float32(147.8))
    return np.rint(np.clip(shade, np.float32(0), np.float32(1)) * np.float32(255)).astype(np.uint8)


def _covered(
    maps: npt.NDArray[np.int8], font: npt.NDArray[np.int64], which: npt.NDArray[np.int64], x: F32, y: F32, between: Any
) -> F32:
    """Return how much of every pixel a character covers, in [0, 1], for places relative to its centre."""
    half = between(-0.15, 0.15)  # the tangent of half the angle: 17 degrees either way
    cos, sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    size, stretch, shear = between(0.75, 1.15), between(0.8, 1.25), between(-0.25, 0.25)
    cells = np.float32(EM / 30) / size  # of the map per pixel: an em is 30 pixels
    u, v = (cos * x + sin * y) * stretch, cos * y - sin * x
    u = (u + shear * v) * cells + np.float32((GRID - 1) / 2)
    v = v * cells + np.float32((GRID - 1) / 2)
    outside = (u < 0) | (v < 0) | (u > GRID - 1) | (v > GRID - 1)
    u, v = (np.clip(a, np.float32(0), np.float32(GRID - 1.001)) for a in (u, v))
    column, row = u.astype(np.int64), v.astype(np.int64)
    fu, fv = u - column.astype(np.float32), v - row.astype(np.float32)
    flat, start = maps.reshape(-1), ((font * maps.shape[1] + which) * GRID + row) * GRID + column
    corner = [flat[start + step].astype(np.float32) for step in (0, 1, GRID, GRID + 1)]
    top, bottom = (a + (b - a) * fu for a, b in (corner[:2], corner[2:]))
    distance = (top + (bottom - top) * fv) * np.float32(REACH / 127) + between(-0.3, 0.9)
    return np.where(outside, np.float32(0), np.clip(distance / cells + np.float32(0.5), np.float32(0), np.float32(1)))
