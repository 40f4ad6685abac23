"""What precedes the first trial: the source, its scores, and a look at the space. It takes long, and may need a GPU.

It is one function, ``open_search``. Without a cluster the driver calls it, with one a worker does (``remote``): what it
gives is small, all else are files of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import timm
from huggingface_hub import try_to_load_from_cache

from prunesweep.models import UserError, cut
from prunesweep.models.recalibrate import recalibrate
from prunesweep.search.config import SearchConfig, SourceTable
from prunesweep.search.space.space import Spread, Summary
from prunesweep.training import EVAL_BATCH, evaluate

from .source import Kept, Prepared, Progress, prepare

__all__ = ["SAMPLE", "Opening", "open_search"]

SAMPLE = 256  # points of the space whose cost is shown before the search
SCORED = 16  # of them, those that are also cut and evaluated without training


@dataclass(frozen=True, kw_only=True)
class Opening(Kept):
    """What a search is begun with, and what is shown of its space.

    ``zero_shot`` is top-1 before finetuning of some of the sample, on ``search.screen_images`` of the training split.
    """

    summary: Summary
    zero_shot: Spread


def open_search(config: SearchConfig, folder: Path, progress: Progress, *, fetch: bool = True) -> Opening:
    """Make the source and its scores, or find them, and look at the space.

    Args:
        config: the search's configuration.
        folder: the cache, see ``prepare``.
        progress: told what goes on.
        fetch: from the hub, weights that this machine does not have.

    Raises:
        UserError: as ``prepare``; or the weights would have to be fetched.
    """
    if not fetch:
        _check_downloaded(config.source)
    prepared = prepare(config, folder, progress)
    summary = prepared.space.summarise(SAMPLE, config.seed)
    return Opening(
        **{field.name: getattr(prepared, field.name) for field in fields(Kept)},
        summary=summary,
        zero_shot=_zero_shot(prepared, summary, config, progress),
    )


def _zero_shot(prepared: Prepared, summary: Summary, config: SearchConfig, progress: Progress) -> Spread:
    """Accuracy before finetuning of a few points of the sample, as a rung without training has it."""
    images = prepared.data.calibration(config.search.screen_images, EVAL_BATCH, config.seed)
    found: list[float] = []
    points = summary.points[:SCORED]
    for point in points:
        progress("sampling the space", len(found) / len(points), f"{len(found)}/{len(points)}")
        model = cut(prepared.model, prepared.space.decode(point).decision)
        recalibrate(model, images)
        found.append(evaluate(model, images)["top1"])
    progress("sampling the space", 1.0, f"{len(points)}/{len(points)}")
    return Spread.of(found)


def _check_downloaded(source: SourceTable) -> None:
    """Raise UserError for weights from the hub that this machine does not have yet."""
    cfg = timm.get_pretrained_cfg(source.model, allow_unregistered=False) if source.pretrained else None
    if cfg is None or not cfg.hf_hub_id:
        return
    repo = cfg.hf_hub_id + (source.model if cfg.hf_hub_id.endswith("/") else "")
    files = ("model.safetensors", "pytorch_model.bin")
    if not any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        raise UserError(f"the weights {repo} are not on this machine yet; a search would fetch them from the hub")
