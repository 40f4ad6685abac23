"""Making a latency table: by measurement, or from MACs.

The measured objects are small real modules. The attention half and the MLP half of a block (the other half missing)
are measured separately and added, so that not every pair of their widths needs a measurement. Blocks are run bare,
several in a row: taking the difference of two models would add their noise, and one block alone would find its weights
and activations in a cache that a whole model has long overwritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any

import numpy as np
import torch

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.builder import blocks_of, build
from prunesweep.models.counting import block_cost, outside_cost
from prunesweep.models.errors import UserError, nearest
from prunesweep.models.families import family_of, names_with

from .table import Grid, LatencyTable
from .timing import DTYPES, Call, Progress, Setting, device_name, time_calls

__all__ = ["LEAST", "build_table", "macs_table"]

# NViT's group sizes, below which it prunes nothing; smaller sources start at a quarter of their own widths
LEAST: Mapping[str, int] = {"embed": 16, "heads": 1, "qk": 8, "v": 8, "mlp": 16, "sr": 16}
COPIES = 4  # blocks in a row
CHUNK = 128  # modules that are held, and measured in turns, at a time


@dataclass(frozen=True, slots=True)
class Probe:
    """One measurement: the blocks of ``arch``'s only stage, per block; or, as a ``whole``, a model without blocks."""

    arch: Arch
    whole: bool = False


Axes = dict[str, tuple[int, ...]]
Part = tuple[Axes, list[Probe]]  # probes in the order of the axes' crossings
Timer = Callable[[Sequence[Probe]], Sequence[float]]  # milliseconds of each
ABSENT = Block(src=0, mixer="none", heads=0, qk=0, v=0, scale=0.0, mlp=0)


def build_table(
    source: Arch,
    setting: Setting,
    *,
    points: int = 3,
    token_points: int = 0,
    least: Mapping[str, int] | None = None,
    repeats: int = 10,
    min_seconds: float = 0.3,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure a table for records of ``source``'s kind, up to its widths.

    Args:
        source: the model that is going to be compressed.
        setting: the conditions; all latencies are for ``setting.batch`` images.
        points: widths per axis between the least and the source's; what is absent (0 heads, no MLP) comes on top.
        token_points: numbers of tokens for token plans, which multiply the measurements; 0: none (most families).
        least: smallest width of an axis (embed, heads, qk, v, mlp, sr), instead of ``LEAST``.
        repeats: calls per measurement, at least.
        min_seconds: time per measurement, at least.
        progress: called with (turns done, turns in all).

    Raises:
        UserError: an argument is impossible, or the device is not there.
    """
    setting.require_device()
    if setting.device == "cpu" and setting.threads is None:
        setting = dataclasses.replace(setting, threads=torch.get_num_threads())

    def timer(probes: Sequence[Probe]) -> list[float]:
        return _measure(probes, setting, repeats, min_seconds, progress)

    overhead, stages = _fill(source, points, token_points, least or {}, timer)
    return LatencyTable(
        setting=setting,
        device_name=device_name(setting.device),
        torch=torch.__version__,
        source=source,
        overhead=overhead,
        stages=stages,
    )


def macs_table(source: Arch, *, ms_per_gmac: float, batch: int = 1, token_points: int = 0) -> LatencyTable:
    """Make a table whose milliseconds are proportional to MACs, for machines without the device.

    Exact for every record without a token plan between the grid's points: MACs are linear in every width on its own.

    Args:
        source: the model that is going to be compressed.
        ms_per_gmac: milliseconds per 10^9 MACs.
        batch: images per batch; a latency is that of the whole batch.
        token_points: numbers of tokens for token plans; 0: none.

    Returns:
        A table for records of ``source``'s kind, up to its widths.
    """

    def timer(probes: Sequence[Probe]) -> list[float]:
        return [batch * ms_per_gmac * _macs(probe) / 1e9 for probe in probes]

    overhead, stages = _fill(source, 2, token_points, dict.fromkeys(LEAST, 1), timer)
    return LatencyTable(
        setting=Setting(batch=batch),
        device_name=f"{ms_per_gmac:g} ms per GMAC",
        torch=torch.__version__,
        source=source,
        overhead=overhead,
        stages=stages,
    )


def _macs(probe: Probe) -> int:
    if probe.whole:
        return outside_cost(probe.arch).macs
    (stage,) = probe.arch.stages
    return block_cost(probe.arch, stage, stage.blocks[0]).macs


def _fill(
    source: Arch, points: int, token_points: int, least: Mapping[str, int], timer: Timer
) -> tuple[Grid, tuple[dict[str, Grid], ...]]:
    """Time every probe of every grid in one go, and put the times in their places."""
    _check_arguments(source, points, token_points, least)
    axes = [_axes(source, stage, points, token_points, least) for stage in source.stages]
    parts: list[tuple[int, str, Part]] = []
    for s, (stage, own) in enumerate(zip(source.stages, axes, strict=True)):
        parts += [(s, name, part) for name, part in _stage_parts(source, stage, own).items()]
    widths = {f"stages.{s}": own["embed"] for s, own in enumerate(axes)}
    if len(widths) > 1:  # layers between stages are linear in either width: two points each are enough
        widths = {name: tuple(sorted({own[0], own[-1]})) for name, own in widths.items()}
    outside = widths, [_outside(source, crossing) for crossing in product(*widths.values())]
    times = iter(timer([probe for _, probes in (*(part for _, _, part in parts), outside) for probe in probes]))

    def fill(part: Part) -> Grid:
        own, probes = part
        return Grid(own, np.array([next(times) for _ in probes]).reshape([len(points) for points in own.values()]))

    stages: list[dict[str, Grid]] = [{} for _ in axes]
    for s, name, part in parts:
        stages[s][name] = fill(part)
    for own, grids in zip(axes, stages, strict=True):
        mlp = grids.pop("mlp")
        grids.update({name: _whole(grid, mlp, own) for name, grid in grids.items() if name.startswith("attn")})
    return fill(outside), tuple(stages)


def _check_arguments(source: Arch, points: int, token_points: int, least: Mapping[str, int]) -> None:
    if points < 2:
        raise UserError(f"points = {points}: must be at least 2, the ends of every axis")
    if token_points and (token_points < 2 or not family_of(source).supports("tokens")):
        able = names_with("tokens")
        raise UserError(f"token_points = {token_points}: must be 0, or at least 2 and for {able}")
    for name, value in least.items():
        if name not in LEAST:
            raise UserError(f"least has {name!r}; known: {', '.join(LEAST)}. {nearest(name, LEAST)}".strip())
        if value < 1:
            raise UserError(f"least.{name} = {value}: must be at least 1")


def _axes(source: Arch, stage: Stage, points: int, token_points: int, least: Mapping[str, int]) -> Axes:
    """Choose the points of every axis of a stage; 0 is on those that may be absent."""

    def axis(name: str, most: int, number: int = points) -> tuple[int, ...]:
        floor = min(least.get(name, min(LEAST[name], max(1, most // 4))), most)
        return _spread(floor, most, number) if most else (0,)

    blocks = [block for block in stage.blocks if block.mixer == "attn"]
    valued = [block for block in stage.blocks if block.mixer != "xca"]
    v = max((width for block in valued for width in (block.v_widths or (block.total_v,))), default=0)
    own: Axes = {"embed": axis("embed", stage.width)}
    if token_points:
        own["tokens"] = _spread(source.prefix_tokens + 1, source.tokens, token_points)
    own["heads"] = tuple(sorted({0, *axis("heads", max((block.heads for block in blocks), default=0))}))
    own["qk"] = axis("qk", max((block.qk for block in blocks), default=0))
    own["v"] = axis("v", v)
    if stage.sr_ratio > 1 or source.pooled_map:
        own["sr"] = axis("sr", max((block.sr for block in blocks), default=0))
    own["mlp"] = tuple(sorted({0, *axis("mlp", max(block.mlp for block in stage.blocks))}))
    return own


def _spread(least: int, most: int, points: int) -> tuple[int, ...]:
    """Return ``least``, ``most`` and multiples of ``least`` evenly between them, which are friendlier to kernels."""
    step = (most - least) / (points - 1)
    between = {least * round((least + i * step) / least) for i in range(1, points - 1)}
    return tuple(sorted({least, most, *between}))


def _stage_parts(source: Arch, stage: Stage, axes: Axes) -> dict[str, Part]:
    """List everything that is measured in a stage; ``mlp`` becomes a part of the whole blocks."""
    scale = next((block.scale for block in stage.blocks if block.mixer == "attn"), 1.0)

    def part(make: Callable[..., Block], **own: tuple[int, ...]) -> Part:
        """Blocks at the crossings of ``own``; ``make`` takes all of a crossing but embed and tokens."""
        cells = [dict(zip(own, cell, strict=True)) for cell in product(*own.values())]
        rests = [{name: x for name, x in cell.items() if name not in ("embed", "tokens")} for cell in cells]
        probes = [_probe(source, stage, cell, make(**rest)) for cell, rest in zip(cells, rests, strict=True)]
        return own, probes

    def attention(**own: bool) -> Part:
        def make(**widths: int) -> Block:
            return Block(src=0, scale=scale, mlp=0, **own, **widths)  # type: ignore[arg-type]

        return part(make, **{name: p for name, p in axes.items() if name != "mlp"} | {"heads": axes["heads"][1:]})

    def absent(**changes: Any) -> Block:
        return dataclasses.replace(ABSENT, **changes)

    outer = {name: points for name, points in axes.items() if name in ("embed", "tokens")}
    embed = axes["embed"]
    parts = {"attn": attention(), "mlp": part(absent, **outer, mlp=axes["mlp"][1:])}
    if any(block.shifted for block in stage.blocks):
        parts["attn_shifted"] = attention(shifted=True)
    if any(block.whole_map for block in stage.blocks):
        parts["attn_whole_map"] = attention(whole_map=True)
    if axes["v"] != (0,) and family_of(source).supports("convolutions"):
        for mixer in ("conv1x1", "conv3x3"):
            parts[mixer] = part(lambda conv, mixer=mixer: absent(mixer=mixer, v=conv), embed=embed, conv=axes["v"])
    used = {block.mixer for block in stage.blocks}
    if "sepconv" in used:
        parts["sepconv"] = part(lambda conv: absent(mixer="sepconv", v=conv), embed=embed, conv=axes["v"])
    if "pool" in used:
        parts["pool"] = part(lambda: absent(mixer="pool"), embed=embed)
    if "xca" in used:
        between = [block for block in stage.blocks if block.mixer == "xca"]
        most, each = max(block.heads for block in between), between[0].qk
        parts["xca"] = part(
            lambda channel_heads: absent(mixer="xca", heads=channel_heads, qk=each, v=each),
            embed=embed,
            channel_heads=tuple(sorted({1, -(-most // 2), most})),
        )
    if family_of(source).norm_residuals:
        parts["norm_residual"] = part(lambda: absent(norm_residual=True), embed=embed)
    if "tokens" in axes:
        for form in ("sparse", "dense"):
            plans = [(width, absent(tokens=tokens, merge=form)) for width, tokens in product(embed, axes["tokens"])]
            parts[f"merge_{form}"] = outer, [_probe(source, stage, {"embed": width}, plan) for width, plan in plans]
    return parts


def _probe(source: Arch, stage: Stage, cell: Mapping[str, int], block: Block) -> Probe:
    """Make a probe: ``COPIES`` of a block in a model that is otherwise as small as possible.

    Fewer tokens are a smaller grid.
    """
    grid = stage.grid
    if cell.get("tokens", source.tokens) != source.tokens:
        grid = (1, cell["tokens"] - source.prefix_tokens)
    side = family_of(source).probe_patch
    arch = dataclasses.replace(
        source,
        img_size=family_of(source).probe_images(grid, side),
        patch_size=(side, side),
        in_chans=1,
        num_classes=1,
        stem=None,
        stages=(dataclasses.replace(stage, width=cell["embed"], grid=grid, blocks=(block,) * COPIES),),
    )
    return Probe(arch)


def _outside(source: Arch, widths: Sequence[int]) -> Probe:
    """Make a model whose blocks do nothing."""
    stages = [
        dataclasses.replace(stage, width=width, blocks=(ABSENT,))
        for stage, width in zip(source.stages, widths, strict=True)
    ]
    return Probe(dataclasses.replace(source, stages=tuple(stages)), whole=True)


def _whole(attention: Grid, mlp: Grid, axes: Axes) -> Grid:
    """Add halves to whole blocks; a half is 0 where it is missing."""
    names = list(axes)
    halves = np.pad(attention.values, [(int(name == "heads"), 0) for name in names[:-1]])[..., None]
    mlps = np.pad(mlp.values, [(int(name == "mlp"), 0) for name in mlp.axes])
    return Grid(axes, halves + mlps.reshape([len(axes[name]) if name in mlp.axes else 1 for name in names]))


def _measure(
    probes: Sequence[Probe], setting: Setting, repeats: int, min_seconds: float, progress: Progress | None
) -> list[float]:
    """Measure every probe in milliseconds, ``CHUNK`` at a time in an order that spreads drift over all axes alike."""
    order = Random(0).sample(range(len(probes)), len(probes))
    times = [0.0] * len(probes)
    for start in range(0, len(order), CHUNK):
        own = order[start : start + CHUNK]
        inputs: dict[tuple[int, ...], torch.Tensor] = {}
        calls = [_call(probes[i], setting, inputs) for i in own]

        def report(done: int, total: int, start: int = start, count: int = len(own)) -> None:
            if progress:
                turns = total // count
                progress(start * turns + done, len(probes) * turns)

        timings = time_calls(calls, setting, repeats=repeats, min_seconds=min_seconds, progress=report)
        for i, timing in zip(own, timings, strict=True):
            times[i] = timing.median_ms / (1 if probes[i].whole else COPIES)
    return times


def _call(probe: Probe, setting: Setting, inputs: dict[tuple[int, ...], torch.Tensor]) -> Call:
    """Return a function that runs the probe's model, or only its blocks, on random input.

    Inputs of one shape are shared.
    """
    arch = probe.arch
    stage = arch.stages[0]
    model: Any = build(arch).to(setting.device, DTYPES[setting.dtype]).eval()
    own, options = family_of(arch).block_input(arch, stage)
    shape = (setting.batch, *own)
    if probe.whole:
        shape, options = (setting.batch, arch.in_chans, *arch.img_size), {}
    x_first = inputs.get(shape)
    if x_first is None:
        x_first = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
            setting.device, DTYPES[setting.dtype]
        )
        inputs[shape] = x_first
    modules = [model] if probe.whole else blocks_of(model)
    runs: list[Any] = [torch.compile(m, dynamic=False) if setting.compiled else m for m in modules]

    def call() -> None:
        x = x_first
        for run in runs:
            x = run(x, **options)

    return call
