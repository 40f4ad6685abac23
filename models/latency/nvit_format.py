"""NViT's latency tables (``latency_head.json`` of arXiv 2110.04869's code), read and written.

Nested objects, keyed by the widths of one ViT block, down to its latency in seconds per batch:

    {"EMB_256": {"QK_1_16": {"V_16": {"MLP_1": 0.0066, "MLP_128": 0.0069, ...}, ...}, ...}, ...}

``QK_H_q`` is H heads of query/key width q, ``V_v`` the value width of a head. ``MLP_1`` stands for a block without MLP.
A residual width of 0 with latency 0 is understood. Device, batch and the like are not in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunesweep.models.arch import Arch
from prunesweep.models.errors import UserError
from prunesweep.models.families import family_of

from .table import Grid, LatencyTable
from .timing import Setting

__all__ = ["from_nvit", "to_nvit"]

AXES = ("embed", "heads", "qk", "v", "mlp")
LEVELS = (("EMB", 1), ("QK", 2), ("V", 1), ("MLP", 1))  # name and number of widths of a nested object's keys


def from_nvit(
    data: Mapping[str, Any], *, source: Arch, setting: Setting, device_name: str, torch: str = "unknown"
) -> LatencyTable:
    """Read NViT's nested form as a table. It holds the blocks alone, so ``predict`` is the sum of the blocks.

    Args:
        data: the nested objects, as ``json.load`` gives them.
        source: the ViT whose blocks were measured; its widths need not be on the grid.
        setting: batch, device and dtype of the measurement (NViT's own table: batch 256, float32).
        device_name: the device's name (NViT's own table: a V100).
        torch: torch's version.

    Raises:
        UserError: ``source`` is no ViT, a key is not of the form above, or a crossing of the grid is missing.
    """
    if not family_of(source).supports("global_attention") or family_of(source).supports("rotary"):
        raise UserError(f"source is of family {source.family!r}: NViT's tables are for family 'vit'")
    cells = dict(_cells(data, 0, ()))
    axes = {name: sorted({cell[i] for cell in cells}) for i, name in enumerate(AXES)}
    shape = [len(points) for points in axes.values()]
    if len(cells) != math.prod(shape):
        raise UserError(f"an NViT table of {' x '.join(map(str, shape))} widths needs all crossings, got {len(cells)}")
    values = np.array([cells[cell] for cell in sorted(cells)]).reshape(shape) * 1e3
    values = np.concatenate([np.zeros((1, *shape[1:])), values])
    points = {"embed": (0, *axes["embed"])} | {name: tuple(axes[name]) for name in AXES[1:]}
    overhead = Grid({"stages.0": (0, points["embed"][-1])}, np.zeros(2))
    return LatencyTable(
        setting=setting,
        device_name=device_name,
        torch=torch,
        source=source,
        overhead=overhead,
        stages=({"attn": Grid(points, values)},),
    )


def _cells(data: Any, level: int, widths: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
    """Yield all (embed, heads, qk, v, mlp) and their seconds."""
    if level == len(LEVELS):
        if isinstance(data, bool) or not isinstance(data, (int, float)) or not 0 <= data < math.inf:
            raise UserError(f"the NViT table has {data!r} at {dict(zip(AXES, widths, strict=True))}: not a latency")
        return [(widths, float(data))]
    name, count = LEVELS[level]
    if not isinstance(data, Mapping):
        raise UserError(f"the NViT table must have objects down to {name}, got {type(data).__name__}")
    cells = []
    for key, below in data.items():
        found, *numbers = str(key).split("_")
        if found != name or len(numbers) != count or not all(n.isdecimal() and int(n) for n in numbers):
            raise UserError(f"the NViT table has a key {key!r}: must be {'_'.join([name, *['N'] * count])}, N >= 1")
        own = [0 if (name, n) == ("MLP", "1") else int(n) for n in numbers]
        cells += _cells(below, level + 1, (*widths, *own))
    return cells


def to_nvit(table: LatencyTable) -> dict[str, Any]:
    """Write a ViT's table in NViT's nested form, in seconds per batch.

    The form knows neither blocks without attention nor anything outside the blocks: those are left out.

    Raises:
        UserError: the table is not one of a ViT with all its tokens, or has an MLP of width 1, which means none here.
    """
    grid = table.stages[0]["attn"]
    if not family_of(table.source).supports("global_attention") or tuple(grid.axes) != AXES:
        raise UserError(f"NViT's form has the axes {', '.join(AXES)} of a ViT; this table has {', '.join(grid.axes)}")
    if 1 in grid.axes["mlp"]:
        raise UserError("this table has MLPs of width 1, which stands for none in NViT's form")

    def kept(name: str) -> Sequence[tuple[int, int]]:
        """Place and width of the points of an axis that the form can say."""
        return [(i, width) for i, width in enumerate(grid.axes[name]) if width or name == "mlp"]

    return {
        f"EMB_{embed}": {
            f"QK_{heads}_{qk}": {
                f"V_{v}": {f"MLP_{mlp or 1}": float(grid.values[e, h, q, w, m]) / 1e3 for m, mlp in kept("mlp")}
                for w, v in kept("v")
            }
            for h, heads in kept("heads")
            for q, qk in kept("qk")
        }
        for e, embed in kept("embed")
    }
