"""Prediction error of a latency table, from predictions and measurements of whole random models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.builder import build

from .table import Grid, LatencyTable
from .timing import Progress, measure_all

__all__ = ["PredictionError", "kendall", "prediction_error", "random_record", "spearman"]

Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class PredictionError:
    """Predicted and measured milliseconds per batch of the same models."""

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def relative(self) -> Values:
        """|predicted - measured| / measured of every model."""
        return np.abs(np.divide(self.predicted, self.measured) - 1)

    @property
    def median_error(self) -> float:
        """Median of the relative errors."""
        return float(np.median(self.relative))

    @property
    def max_error(self) -> float:
        """Largest relative error."""
        return float(self.relative.max())

    @property
    def bias(self) -> float:
        """Median of predicted / measured, less 1: the error common to all models, as when the machine got slower."""
        return float(np.median(np.divide(self.predicted, self.measured)) - 1)

    @property
    def spearman(self) -> float:
        """Rank correlation, in [-1, 1]."""
        return spearman(self.predicted, self.measured)

    @property
    def kendall(self) -> float:
        """Kendall's tau-b, in [-1, 1]: the share of pairs in the right order, less that of the others."""
        return kendall(self.predicted, self.measured)

    def to_dict(self) -> dict[str, Any]:
        """Return the samples and their summary, JSON-ready."""
        summary = {name: getattr(self, name) for name in ("median_error", "max_error", "bias", "spearman", "kendall")}
        return {**summary, "predicted": list(self.predicted), "measured": list(self.measured)}


def prediction_error(
    table: LatencyTable,
    *,
    n: int = 20,
    seed: int = 0,
    repeats: int = 10,
    min_seconds: float = 1.0,
    progress: Progress | None = None,
) -> PredictionError:
    """Build random models within the widths of a table, and compare predicted with measured latency.

    Args:
        table: the table; models are of its source's kind and measured in its setting.
        n: number of models, at least 2.
        seed: of the random records.
        repeats: calls per model, at least.
        min_seconds: measured time per model, at least.
        progress: called with (turns done, turns in all).

    Returns:
        Predicted and measured milliseconds per batch of every model.

    Raises:
        ValueError: ``n`` is below 2.
        UserError: the device is not there.
    """
    if n < 2:
        raise ValueError(f"n = {n}: a rank correlation needs at least 2 models")
    random = Random(seed)
    archs = [random_record(table, random) for _ in range(n)]
    options: dict[str, Any] = {"repeats": repeats, "min_seconds": min_seconds, "progress": progress}
    timings = measure_all([build(arch) for arch in archs], table.setting, **options)
    return PredictionError(tuple(map(table.predict, archs)), tuple(timing.median_ms for timing in timings))


def random_record(table: LatencyTable, random: Random) -> Arch:
    """Draw a record within the table's grid: depth and largest keep rate for the model, widths for every block.

    Widths are multiples of an axis's least one, as cutting in groups leaves them. One block in ten convolves where the
    table has convolutions, one in ten each lacks its mixer or its MLP where the table has such blocks.

    Args:
        table: the table whose grid limits the widths.
        random: the source of random numbers.
    """
    keep, depth = random.uniform(0.3, 1.0), random.uniform(0.5, 1.0)
    stages = []
    for stage, grids in zip(table.source.stages, table.stages, strict=True):
        blocks = random.sample(stage.blocks, max(1, round(depth * len(stage.blocks))))
        width = _draw(random, grids["attn"].axes["embed"], keep)
        own = tuple(_random_block(random, grids, stage, block, keep) for block in sorted(blocks, key=lambda b: b.src))
        stages.append(dataclasses.replace(stage, width=width, blocks=own))
    return dataclasses.replace(table.source, stages=tuple(stages))


def _random_block(random: Random, grids: Mapping[str, Grid], stage: Stage, source: Block, keep: float) -> Block:
    axes = grids["attn"].axes
    draw, missing = random.random(), 0 in axes["heads"]
    mlp = 0 if 0 in axes["mlp"] and random.random() < 0.1 else _draw(random, axes["mlp"], keep)
    if draw < 0.1 and "conv3x3" in grids and missing:
        mixer, v = random.choice(("conv1x1", "conv3x3")), _draw(random, grids["conv3x3"].axes["conv"], keep)
        return Block(src=source.src, mixer=mixer, heads=0, qk=0, v=v, scale=0.0, mlp=mlp)
    if source.mixer == "xca" and "xca" in grids and draw >= 0.1:
        heads = _draw(random, grids["xca"].axes["channel_heads"], keep)
        return dataclasses.replace(source, heads=heads, mlp=mlp)
    if source.mixer not in ("attn", "none") and source.mixer in grids and draw >= 0.1:
        channels = grids[source.mixer].axes.get("conv")
        v = _draw(random, channels, keep) if channels else 0
        return Block(src=source.src, mixer=source.mixer, heads=0, qk=0, v=v, scale=0.0, mlp=mlp)
    if (draw < 0.2 and missing) or axes["heads"] == (0,):
        return Block(src=source.src, mixer="none", heads=0, qk=0, v=0, scale=0.0, mlp=mlp)
    heads, qk, v = (_draw(random, axes[name], keep) for name in ("heads", "qk", "v"))
    sr = _draw(random, axes["sr"], keep) if "sr" in axes else 0
    return Block(
        src=source.src,
        heads=heads,
        qk=qk,
        v=v,
        scale=source.scale or qk**-0.5,
        mlp=mlp,
        sr=sr,
        shifted="attn_shifted" in grids and source.shifted,
        whole_map="attn_whole_map" in grids and source.whole_map,
    )


def _draw(random: Random, points: tuple[int, ...], keep: float) -> int:
    """Draw a multiple of the least positive point, at most ``keep`` of the largest."""
    step = next((point for point in points if point), 0)
    return step * random.randint(1, max(1, int(keep * points[-1]) // step)) if step else 0


def spearman(x: Any, y: Any) -> float:
    """Compute Spearman's rank correlation, in [-1, 1]; equal values share their mean rank.

    Args:
        x: numbers (n,).
        y: as many numbers (n,).
    """
    return float(np.corrcoef(_ranks(np.asarray(x)), _ranks(np.asarray(y)))[0, 1])


def _ranks(x: Values) -> Values:
    return (x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2


def kendall(x: Any, y: Any) -> float:
    """Compute Kendall's tau-b, in [-1, 1]; pairs that are equal in x or in y are left out of the norm.

        tau_b = sum_{i,j} sign(x_i - x_j) sign(y_i - y_j) / sqrt(#{x_i != x_j} * #{y_i != y_j})

    Args:
        x: numbers (n,).
        y: as many numbers (n,).
    """
    signs_x, signs_y = (np.sign(np.subtract.outer(z, z)) for z in (np.asarray(x), np.asarray(y)))
    return float((signs_x * signs_y).sum() / np.sqrt((signs_x**2).sum() * (signs_y**2).sum()))
