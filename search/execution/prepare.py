"""Prepare a search before its first trial: the source, its scores, and a sample of the space.

That takes long and may need a GPU, so with a cluster a worker does it (``remote``), and without one the driver. What
``prepare_search`` returns is small; everything else it makes is a file in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import timm
from huggingface_hub import try_to_load_from_cache

from prunesweep.models.errors import NotHere
from prunesweep.search.config import SearchConfig, SourceTable
from prunesweep.search.space.space import Range, Summary

from .cutting import Cutter
from .source import LoadedSource, Progress, SourceArtifacts, Unshared, make_subspaces, prepare

__all__ = ["SAMPLE", "PreparedSearch", "prepare_or_share", "prepare_search"]

SAMPLE = 256  # points of the space whose cost is shown before the search
SCORED = 8  # of them, those whose models are also made and evaluated without training


@dataclass(frozen=True, kw_only=True)
class PreparedSearch(SourceArtifacts):
    """The files that a search starts from, and the figures of its space that are shown before the first trial.

    Attributes:
        summary: costs of a sample of the space.
        zero_shot: top-1 in percent, before finetuning, of some points of the sample on ``search.screen_images`` images
            of the training split; None in a dry run.
    """

    summary: Summary
    zero_shot: Range | None


def prepare_search(
    config: SearchConfig,
    folder: Path,
    progress: Progress,
    *,
    decide: bool = True,
    dry: bool = False,
    share: int = 1,
) -> PreparedSearch:
    """Make the source and its scores or find them in the cache, and sample the space.

    Args:
        config: the search's configuration.
        folder: the cache; see ``prepare``.
        progress: called with what is being done and the share of it done.
        decide: as for ``prepare``.
        dry: download, train, score and measure nothing: find what the cache has.
        share: as for ``prepare``.

    Raises:
        Unshared: as ``prepare``.
        UserError: as ``prepare``.
        NotHere: ``dry``, and something is not on this machine yet.
    """
    if dry:
        _check_downloaded(config.source)
    prepared = prepare(config, folder, progress, decide=decide and not dry, make=not dry, share=share)
    summary = prepared.space.summarise(SAMPLE, config.seed)
    own = {field.name: getattr(prepared, field.name) for field in fields(SourceArtifacts)}
    if not dry:
        own["subspaces"] = make_subspaces(config, prepared, folder, progress)
    return PreparedSearch(
        **own,
        summary=summary,
        zero_shot=None if dry else _zero_shot(prepared, summary, config, folder / "scores", progress),
    )


def prepare_or_share(config: SearchConfig, folder: Path, share: int, progress: Progress) -> PreparedSearch | int:
    """``prepare_search``; or the number of parts that ``prepare_part`` is to make before, for ``share`` processes."""
    try:
        return prepare_search(config, folder, progress, share=share)
    except Unshared as unshared:
        return unshared.parts


def _zero_shot(prepared: LoadedSource, summary: Summary, config: SearchConfig, kept: Path, progress: Progress) -> Range:
    """Measure a few points of the sample without finetuning, as a rung of 0 epochs does.

    What is measured is top-1, or agreement with the source where that is an objective.
    """
    cutter, found = Cutter(prepared.model, prepared.data, config, kept=kept), list[float]()
    points = summary.points[:SCORED]
    for point in points:
        progress("sampling the space", len(found) / len(points), f"{len(found)}/{len(points)}")
        found.append(cutter.accuracy(cutter.screened(prepared.space.decode(point).decision)))
    progress("sampling the space", 1.0, f"{len(points)}/{len(points)}")
    return Range.of(found)


def _check_downloaded(source: SourceTable) -> None:
    """Raise NotHere for weights from the hub that this machine does not have yet."""
    if not source.pretrained or source.model.startswith("local-dir:"):
        return
    cfg = timm.get_pretrained_cfg(source.model, allow_unregistered=False)
    if cfg is None or not cfg.hf_hub_id:
        return
    repo = cfg.hf_hub_id + (source.model if cfg.hf_hub_id.endswith("/") else "")
    files = ("model.safetensors", "pytorch_model.bin")
    if not any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        raise NotHere(f"the weights {repo} are not on this machine yet; a search would fetch them from the hub")
