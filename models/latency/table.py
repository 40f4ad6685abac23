"""Latency of a record from a table of measured blocks, without building or running it.

Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency" (NViT, CVPR 2023, arXiv
2110.04869), section 3.3 and appendix: the latency of a network is the sum over its blocks of a value interpolated
linearly in the residual width, heads, query/key width, value width and MLP width. Added here: what lies outside the
blocks, missing halves, convolutions, shifted windows, PVTv2's reduced maps, token plans, and one grid per stage.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError, nearest
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import digest
from prunesweep.models.io.reading import read_json

from .timing import Setting

__all__ = ["Grid", "LatencyTable"]

FORMAT = "prunesweep/latency/1"
SEAL = "digest"  # of all the rest of a file; absent from those that older versions wrote
UNIT = "ms per batch"
WHOLE = ("embed", "tokens", "heads", "qk", "v", "sr", "mlp")
OPTIONAL = ("tokens", "sr")
GRIDS: Mapping[str, tuple[str, ...]] = {  # axes in order
    "attn": WHOLE,
    "attn_shifted": WHOLE,
    "attn_whole_map": WHOLE,
    "conv1x1": ("embed", "conv"),
    "conv3x3": ("embed", "conv"),
    "sepconv": ("embed", "conv"),
    "pool": ("embed",),
    "xca": ("embed", "channel_heads"),
    "norm_residual": ("embed",),
    "merge_sparse": ("embed", "tokens"),
    "merge_dense": ("embed", "tokens"),
}
FREE = ("source", "num_classes", "feature_head", "stages", "norm_eps")  # fields that do not bear on a table's use


@dataclass(frozen=True, eq=False)
class Grid:
    """Milliseconds at the crossings of ``axes``, linear in each axis in between.

    ``axes`` gives the points of every axis, by name: rising whole numbers.

    ``values`` has one dimension per axis, in the order of ``axes``.
    """

    axes: Mapping[str, tuple[int, ...]]
    values: np.ndarray[Any, np.dtype[np.float64]]

    def __call__(self, where: str, at: Mapping[str, float]) -> float:
        """Interpolate. ``at`` has a coordinate for every axis; UserError names ``where`` one is out of range."""
        values: Any = self.values
        for name, points in self.axes.items():
            x = at[name]
            if not points[0] <= x <= points[-1]:
                raise UserError(
                    f"{where}.{name} = {x:g}: outside {points[0]}..{points[-1]}, the range of the latency table; "
                    "keep within it, or build a table with a wider range"
                )
            i = bisect.bisect_right(points, x) - 1
            if points[i] == x:
                values = values[i]
            else:
                share = (x - points[i]) / (points[i + 1] - points[i])
                values = (1 - share) * values[i] + share * values[i + 1]
        return float(values)

    def covers(self, at: Mapping[str, float]) -> bool:
        """Whether every coordinate lies within its axis."""
        return all(points[0] <= at[name] <= points[-1] for name, points in self.axes.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {"axes": {name: list(points) for name, points in self.axes.items()}, "values": self.values.tolist()}

    @classmethod
    def from_dict(cls, data: Any, where: str, names: Sequence[str]) -> Grid:
        """Read ``to_dict``'s form.

        Args:
            data: the JSON object.
            where: its place in the table, for messages.
            names: the axes that it may have.

        Raises:
            UserError: a key, an axis or a value is wrong; the message names it.
        """
        data = _object(data, where, ("axes", "values"))
        optional = OPTIONAL if names == WHOLE else ()
        needed = [name for name in names if name not in optional]
        axes = _object(data["axes"], f"{where}.axes", needed, names)
        if list(axes) != [name for name in names if name in axes]:
            raise UserError(f"{where}.axes are {', '.join(axes)}: must come in the order {', '.join(names)}")
        for name, points in axes.items():
            numbers = isinstance(points, list) and points and all(type(point) is int for point in points)
            if not numbers or points != sorted(set(points)):
                raise UserError(f"{where}.axes.{name} = {points!r}: must be a list of rising whole numbers")
            axes[name] = tuple(points)
        try:
            values = np.array(data["values"], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}.values: must be a nested list of numbers: {error}") from error
        shape = tuple(len(points) for points in axes.values())
        if values.shape != shape or not np.isfinite(values).all():
            raise UserError(f"{where}.values has shape {values.shape}: its axes need {shape}, all finite")
        return cls(axes, values)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A block of a record: the grids whose sum is its latency, and its coordinates in all of them."""

    stage: int
    where: str
    grids: tuple[Grid, ...]
    at: Mapping[str, float]

    def ms(self) -> float:
        return sum(grid(self.where, self.at) for grid in self.grids)

    def gain(self, **less: float) -> float:
        """Compute what other coordinates would save; 0 where they lie outside a grid."""
        narrower = dataclasses.replace(self, at={**self.at, **less})
        return self.ms() - narrower.ms() if all(grid.covers(narrower.at) for grid in self.grids) else 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class LatencyTable:
    """Measured latencies of blocks, for records of one kind (that of ``source``) under one setting.

    ``stages`` has grids by name for every stage of ``source``, in milliseconds per batch:

    - ``attn``: whole blocks over embed, tokens (where token plans were measured), heads, qk, v, sr (where the stage
      reduces its map) and mlp; heads = 0 is a block without attention, mlp = 0 one without MLP;
    - ``attn_shifted``: the same with Swin's shifted windows; ``attn_whole_map``: the same over whole maps (Hiera, SAM);
    - ``conv1x1``, ``conv3x3``, ``sepconv``: convolutions over embed and conv, their own width;
    - ``pool``: pooling, over embed;
    - ``xca``: what XCiT's attention between channels and its convolutions add, over embed and channel_heads, its heads;
    - ``norm_residual``: what the normalised residual of a missing mixer adds, over embed;
    - ``merge_sparse``, ``merge_dense``: what a token plan adds, over embed and tokens.

    ``overhead`` is all that lies outside the blocks, over the stages' widths (stages.0, stages.1, ...).
    """

    setting: Setting
    device_name: str
    torch: str  # its version
    source: Arch
    overhead: Grid
    stages: tuple[Mapping[str, Grid], ...]
    check: Mapping[str, Any] | None = None  # prediction error on random records (``models.latency.prediction``)

    def predict(self, arch: Arch) -> float:
        """Predict milliseconds per batch: the sum over the blocks of ``arch``, and the overhead outside them.

        Ragged value heads count with their mean width, though heads of unequal width run group after group. NViT's
        frozen token factors count nothing.

        Raises:
            UserError: the record is of another kind than ``source``, a width lies outside the grid, or a block has
                something that the table was built without, such as a token plan.
        """
        self._check_kind(arch)
        return self.overhead("arch", _widths(arch)) + sum(block.ms() for block in self._place(arch))

    def outside(self, arch: Arch) -> float:
        """Predict milliseconds per batch outside the blocks of ``arch``. Raises UserError out of the table's range."""
        return self.overhead("arch", _widths(arch))

    def block(self, arch: Arch, stage: Stage, block: Block) -> float:
        """Predict milliseconds per batch of one block in ``stage``, which is found by its grid.

        Raises UserError out of the table's range, or for something that the table was built without.
        """
        s = next(s for s, own in enumerate(self.source.stages) if own.grid == stage.grid)
        return self._place_block(s, arch, stage, block, f"blocks[{block.src}]").ms()

    def unit_gains(self, arch: Arch) -> dict[str, float]:
        """Predict the milliseconds per batch that one unit less of every prunable vector saves, at ``arch``'s widths.

        NViT's one-unit backward differences, with the names of scores: ``stages.0.embed``; of every block, such as
        ``blocks.3.qk``: heads, qk, v (of all heads at once), attn (one unit of one head's query, key and value),
        mlp and sr. 0 where the narrower point lies outside the grid, and where wider measured as faster, which is
        noise (a few per cent of the steps in NViT's own table).
        """
        self._check_kind(arch)
        widths = _widths(arch)
        gains = {}
        for s in range(len(arch.stages)):
            rest = _Placed(s, "arch", (self.overhead,), widths)
            gains[f"stages.{s}.embed"] = rest.gain(**{f"stages.{s}": widths[f"stages.{s}"] - 1})
        for i, (block, placed) in enumerate(zip(arch.blocks, self._place(arch), strict=True)):
            at = placed.at
            gains[f"stages.{placed.stage}.embed"] += placed.gain(embed=at["embed"] - 1)
            if block.mixer == "attn":
                for kind in ("heads", "qk", "v"):
                    gains[f"blocks.{i}.{kind}"] = placed.gain(**{kind: at[kind] - 1})
                gains[f"blocks.{i}.attn"] = placed.gain(qk=at["qk"] - 1, v=at["v"] - arch.qk_rows) / block.heads
            if block.mixer == "xca":
                gains[f"blocks.{i}.heads"] = placed.gain(channel_heads=block.heads - 1)
            if block.mixer == "sepconv":
                gains[f"blocks.{i}.v"] = placed.gain(conv=block.total_v - 1)
            for kind, size in (("mlp", block.mlp), ("sr", block.sr)):
                if size:
                    gains[f"blocks.{i}.{kind}"] = placed.gain(**{kind: size - 1})
        return {name: max(gain, 0.0) for name, gain in gains.items()}

    def _place(self, arch: Arch) -> Iterator[_Placed]:
        index = 0
        for s, stage in enumerate(arch.stages):
            for block in stage.blocks:
                yield self._place_block(s, arch, stage, block, f"blocks[{index}]")
                index += 1

    def _place_block(self, s: int, arch: Arch, stage: Stage, block: Block, where: str) -> _Placed:
        names = ["attn_shifted" if block.shifted else "attn_whole_map" if block.whole_map else "attn"]
        if block.mixer not in ("attn", "none"):
            names.append(block.mixer)
        if block.norm_residual:
            names.append("norm_residual")
        if block.tokens is not None:
            names.append(f"merge_{block.merge}")
        for name in names:
            if name not in self.stages[s]:
                raise UserError(
                    f"{where} needs {name!r} latencies of stage {s}, which this table was built without; "
                    f"it has {', '.join(self.stages[s])}. Build a table that has them"
                )
        grids = tuple(self.stages[s][name] for name in names)
        at: dict[str, float] = {"embed": stage.width, "tokens": block.tokens or arch.tokens, "mlp": block.mlp}
        if block.mixer == "attn":
            at |= {"heads": block.heads, "qk": block.qk, "v": block.total_v / block.heads, "sr": block.sr}
        else:  # no attention at any widths; the first ones are as good as others
            at |= {name: points[0] for name, points in grids[0].axes.items() if name in ("qk", "v", "sr")}
            at |= {"heads": 0, "conv": block.total_v, "channel_heads": block.heads}
        return _Placed(s, where, grids, at)

    def _check_kind(self, arch: Arch) -> None:
        """Raise UserError naming the first field that makes ``arch`` a record of another kind."""
        for field in dataclasses.fields(Arch):
            mine, other = getattr(self.source, field.name), getattr(arch, field.name)
            if field.name not in FREE and mine != other:
                raise UserError(f"{field.name} = {other!r}: the latency table was measured with {mine!r}")
        if len(arch.stages) != len(self.stages):
            raise UserError(f"{len(arch.stages)} stages: the latency table has {len(self.stages)}")
        for s, (stage, own) in enumerate(zip(arch.stages, self.source.stages, strict=True)):
            for name in ("grid", "window", "sr_ratio", "res_scale"):
                if getattr(stage, name) != getattr(own, name):
                    found, mine = getattr(stage, name), getattr(own, name)
                    raise UserError(f"stages[{s}].{name} = {found!r}: the latency table was measured with {mine!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form: a header of facts, then the grids."""
        return {
            "format": FORMAT,
            "unit": UNIT,
            "device_name": self.device_name,
            "torch": self.torch,
            "setting": self.setting.to_dict(),
            "source": self.source.to_dict(),
            "check": None if self.check is None else dict(self.check),
            "overhead": self.overhead.to_dict(),
            "stages": [{name: grid.to_dict() for name, grid in stage.items()} for stage in self.stages],
        }

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """Read ``to_dict``'s form. Raises UserError for an unknown key, another format, or grids that do not fit."""
        data = _object(data, "table", ("format", "unit", *(f.name for f in dataclasses.fields(cls))))
        for key, mine in (("format", FORMAT), ("unit", UNIT)):
            if data[key] != mine:
                raise UserError(f"table.{key} = {data[key]!r}: this version reads {mine!r}")
        setting = _object(data["setting"], "table.setting", tuple(f.name for f in dataclasses.fields(Setting)))
        source = Arch.from_dict(data["source"])
        if not isinstance(data["stages"], list) or len(data["stages"]) != len(source.stages):
            raise UserError(f"table.stages: must be a list with one entry for each of {len(source.stages)} stages")
        stages = []
        for s, grids in enumerate(data["stages"]):
            where = f"table.stages[{s}]"
            grids = _object(grids, where, ("attn",), tuple(GRIDS))
            stages.append({name: Grid.from_dict(grid, f"{where}.{name}", GRIDS[name]) for name, grid in grids.items()})
        return cls(
            setting=Setting(**setting),
            device_name=data["device_name"],
            torch=data["torch"],
            source=source,
            overhead=Grid.from_dict(data["overhead"], "table.overhead", list(_widths(source))),
            stages=tuple(stages),
            check=data["check"],
        )

    def save(self, path: str | Path) -> None:
        """Write the table as a JSON file."""
        table = json.loads(json.dumps(self.to_dict()))
        write_text(Path(path), json.dumps({**table, SEAL: digest(table)}))

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what ``save`` wrote. Raises UserError where the file is missing, damaged or of another kind."""
        try:
            data = read_json(Path(path), what="latency table")
            seal = data.pop(SEAL, None) if isinstance(data, dict) else None
            table = cls.from_dict(data)
        except UserError as error:
            known = str(path) in str(error)
            raise error if known else UserError(f"cannot read the latency table {path}: {error}") from error
        if seal is not None and seal != digest(data):
            raise UserError(
                f"{path} is damaged: it has changed since it was measured; measure it again, or copy it again"
            )
        return table


def _widths(arch: Arch) -> dict[str, int]:
    return {f"stages.{s}": stage.width for s, stage in enumerate(arch.stages)}


def _object(data: Any, where: str, needed: Sequence[str], allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Check that ``data`` is a dict with all of ``needed`` and no key outside ``needed`` and ``allowed``; return it."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a JSON object, got {type(data).__name__}")
    known = (*needed, *(name for name in allowed if name not in needed))
    for key in data:
        if key not in known:
            hint = nearest(key, known)
            raise UserError(f"{where} has an unknown key {key!r}; known: {', '.join(known)}. {hint}".strip())
    missing = [name for name in needed if name not in data]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return dict(data)
