"""The source model and its scores: made once, cached under a digest of what they depend on, copied into each run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import nn

from prunesweep.models import Arch, UserError, adopted, arch_of, load, load_provenance, read_arch, save, weights_digest
from prunesweep.models.errors import NotHere, nearest, shown
from prunesweep.models.finite import check_finite
from prunesweep.models.io.files import make_folder
from prunesweep.models.io.provenance import digest, versions
from prunesweep.models.io.store import WEIGHTS
from prunesweep.models.precision import as_stored, dtype_in, to_float32
from prunesweep.pruners import Scores, TrainedMethod, WidthMethod, get_method
from prunesweep.pruners.scores import LEARNED
from prunesweep.pruners.subspaces import can_recover
from prunesweep.search.config import SearchConfig, SourceTable
from prunesweep.search.space.space import Space, score_names
from prunesweep.search.store.front import OWN, quality_of
from prunesweep.training import (
    Data,
    EvalMetrics,
    Recipe,
    cache_logits,
    check_features,
    check_fits,
    check_labels,
    evaluate_on,
    fit,
    name_classes,
    open_data,
    seeded,
    try_quality,
    warn_at_chance,
)
from prunesweep.training.closest import trained_images
from prunesweep.training.data import content_of
from prunesweep.training.jobs.deciding import Deciding
from prunesweep.training.jobs.recovery import Known, Recovery
from prunesweep.training.jobs.scoring import Calibration, Progress, cached_gates, cached_scores
from prunesweep.training.metrics import NAMES as MEASURED
from prunesweep.training.settling import settled
from prunesweep.training.teacher_cache import SHARD, missing_shards, shard_file

from .checks import check_not_in_vain, check_space
from .cutting import own_figures, recovery_of
from .validation import open_test

__all__ = [
    "LoadedSource",
    "NotMade",
    "Progress",
    "SourceArtifacts",
    "Unshared",
    "make_subspaces",
    "open_checked",
    "open_source_data",
    "open_space",
    "prepare",
    "prepare_part",
]

Made = TypeVar("Made")

SUMS = "summing up the source's subspaces"
MOST_BLOCKS = 1000  # of a source
FORMAT = "prunesweep/source/1"  # to be counted up when a source is made otherwise, so that no older one is believed


class Unshared(Exception):
    """What a search makes first is to be divided among so many processes before one goes on with it.

    Args:
        parts: how many.
        folder: the source's, which is made.
    """

    def __init__(self, parts: int, folder: Path) -> None:
        super().__init__(f"{parts} parts")
        self.parts, self.folder = parts, folder


class NotMade(NotHere):
    """What a search would make first is not in the cache, and nothing may be made.

    Args:
        message: what that is.
        arch: the source's record.
        content: what the data hold (``training.data.content_of``).
        described: what ``Data.describe`` says of them.
    """

    def __init__(
        self,
        message: str,
        arch: Arch | None = None,
        content: Mapping[str, Any] | None = None,
        described: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.arch, self.content, self.described = arch, content or {}, described


@dataclass(frozen=True, kw_only=True)
class SourceArtifacts:
    """Where a source and its scores lie in the cache. Small, so it can be sent to other processes that see the cache.

    Attributes:
        folder: the saved source.
        score_files: files of the source's scores, by the name of the scores.
        proposals: files of the decisions of ``search.start_methods``.
        teacher_logits: folders of logits of the recipe's teachers.
        subspaces: file of what projections of the source have in common; None where candidates are not projected, or
            it is not made yet.
        weights: digest of the source's weights.
        fingerprint: digest of the data.
        content: what the data hold (``training.data.content_of``).
        described: what ``Data.describe`` says of the data.
        figures: the source's figures on the validation split.
        searched: its figures on the images that candidates are compared by.
    """

    folder: Path
    score_files: Mapping[str, Path]
    proposals: tuple[Path, ...] = ()
    teacher_logits: tuple[Path, ...] = ()
    subspaces: Path | None = None
    weights: str
    fingerprint: str
    content: Mapping[str, Any]
    described: tuple[str, ...] = ()
    figures: EvalMetrics
    searched: EvalMetrics

    @property
    def arch(self) -> Arch:
        """The source's record."""
        return read_arch(self.folder)


@dataclass(frozen=True, kw_only=True)
class LoadedSource(SourceArtifacts):
    """``SourceArtifacts`` with the data, the model and the space opened in this process."""

    data: Data
    model: nn.Module
    space: Space


def open_space(config: SearchConfig, kept: SourceArtifacts) -> Space:
    """Build the space of a source from its record and its scores.

    Args:
        config: the search's configuration.
        kept: where the source and its scores lie.

    Raises:
        UserError: as for ``Space``.
    """
    scores = {name: Scores.load(path) for name, path in kept.score_files.items()}
    return Space(config.space, kept.arch, scores, projected=config.search.projects(kept.arch))


def prepare(
    config: SearchConfig, cache: Path, progress: Progress, *, decide: bool = True, make: bool = True, share: int = 1
) -> LoadedSource:
    """Open the data, make or find the source, score it or find its scores, and build the space.

    Args:
        config: the search's configuration.
        cache: folder for what takes long to make; created when the first file is written.
        progress: called with what is being done and the share of it done.
        decide: let the methods that the search starts from decide; otherwise only the cache's decisions are found.
        make: train and measure the source, and score it; otherwise all that must be in the cache.
        share: processes that could divide the scores and the teacher's answers among them.

    Raises:
        Unshared: there is enough of it to be divided: then ``prepare_part`` comes first.
        NotMade: ``make`` is false, and the cache does not have all of it.
        UserError: the data or the source are not there, do not go together, or cannot meet the budget.
    """
    model, data, folder, source = _source(config, cache, progress, make=make)
    weights = weights_digest(source)
    names = score_names(config.space, config.scores.method)
    alone = make and share < 2
    own = own_figures(config, source, data, progress) if alone else []  # first, for a function may fail
    files, missing = _scores(config, names, source, data, weights, cache, progress, make=alone)
    if missing and not make:
        raise _not_made(missing, model, data)
    if make and share > 1:
        parts = _parts(config, source, data, weights, cache, len(missing))
        if parts > 1:
            raise Unshared(min(parts, share), folder)
    if missing:
        files, _ = _scores(config, names, source, data, weights, cache, progress, make=True)
    own = own or own_figures(config, source, data, progress)
    proposals = list[Path]()
    for start in _start_runs(config, source, data, weights):
        place = cache / "decisions"
        proposals += _deciding(partial(start.run, place, progress) if decide else partial(start.kept, place), start)
    logits = _logits(config, source, data, cache, progress) if make else ()
    provenance = load_provenance(folder)
    quality = EvalMetrics.of(provenance)
    agreement = 100.0 if "agreement" in config.search.objectives else None
    warn_at_chance(f"source.model = {config.source.model!r}", source, data, quality)
    found = SourceArtifacts(
        folder=folder,
        score_files=files,
        proposals=tuple(proposals),
        teacher_logits=logits,
        weights=weights,
        fingerprint=data.info.fingerprint,
        content=content_of(data),
        described=tuple(data.describe()),
        figures=quality._replace(kl=None, agreement=agreement, **own[0]),
        searched=EvalMetrics.of(provenance.get("search", provenance))._replace(kl=None, agreement=agreement, **own[1]),
    )
    return LoadedSource(**vars(found), data=data, model=source, space=open_space(config, found))


def prepare_part(config: SearchConfig, cache: Path, progress: Progress, *, part: int, parts: int) -> list[Path]:
    """Do one of several parts of ``prepare``: some of the scores, and the teacher's answers to some of the images.

    Every file of scores and answers is written whole by one process, as ``prepare`` would write it; so what all parts
    have made together is what one process makes. The source's sums over calibration images are taken of parts of these;
    ``make_subspaces`` adds them up, which changes them by rounding (in float64).

    Args:
        config, cache, progress: as for ``prepare``.
        part: which one, from 0 on.
        parts: how many there are.

    Returns:
        The files and folders that are this part's in the cache.

    Raises:
        UserError: as for ``prepare``.
    """

    def own(what: str, share: float, note: str) -> None:
        progress(f"{what}, part {part + 1} of {parts}", share, note)

    _, data, _, source = _source(config, cache, own, make=True)
    names = score_names(config.space, config.scores.method)[part::parts]
    weights = weights_digest(source)
    files, _ = _scores(config, names, source, data, weights, cache, own, make=True)
    logits = _logits(config, source, data, cache, own, part, parts)
    shards = range(part, -(-data.train_images // SHARD), parts)
    made = [*files.values(), *(shard_file(folder, shard) for folder in logits for shard in shards)]
    recovery = _projection(config, source)
    if recovery is not None and part < (number := min(parts, recovery.batches(data))):

        def on_batch(done: int, total: int) -> None:
            own(SUMS, done / total, f"{done}/{total} batches")

        place = cache / "scores"
        made.append(recovery.sum_part(source, data, place, part, number, weights=weights, progress=on_batch))
    return made


def _source(
    config: SearchConfig, cache: Path, progress: Progress, *, make: bool
) -> tuple[nn.Module, Data, Path, nn.Module]:
    """Open the data, and make or find the source.

    Returns:
        (source as created, data, folder of the source, source as saved, on its device).
    """
    model, data = open_checked(config)
    if config.search.quality is not None:
        try_quality(config.search.quality, model, data)
    device = torch.device("cuda" if config.resources.gpus_per_trial and torch.cuda.is_available() else "cpu")
    key = _source_key(config, model, data)
    folder = cache / "sources" / _source_name(config, key)
    if not _is_kept(folder, key):
        if not make:
            raise _not_made([_missing_source(config, data)], model, data)
        _make(config, model.to(device), data, folder, key, progress)
    return model, data, folder, to_float32(load(folder)).to(device)


def _scores(
    config: SearchConfig,
    names: Sequence[str],
    source: nn.Module,
    data: Data,
    weights: str,
    cache: Path,
    progress: Progress,
    *,
    make: bool,
) -> tuple[dict[str, Path], list[str]]:
    """Make or find scores: their files by name, and what is missing where none are made."""
    settings = Calibration(**config.scores.model_dump(exclude={"method"}))
    files, missing = dict[str, Path](), list[str]()
    for name in names:
        kept: dict[str, Any] = {"weights": weights, "compute": make}
        try:
            if name == LEARNED:
                run = (config.gates.recipe, config.gates.settings, config.seed)
                files[name] = cached_gates(source, data, *run, cache / "scores", progress, **kept)
            else:
                files[name] = cached_scores(source, name, data, settings, cache / "scores", progress, **kept)
        except NotHere as error:
            missing.append(str(error))
    return files, missing


def _trains(config: SearchConfig) -> bool:
    return any(config.search.rungs or [config.finetune.epochs])


def _logits(
    config: SearchConfig,
    source: nn.Module,
    data: Data,
    cache: Path,
    progress: Progress,
    part: int = 0,
    parts: int = 1,
) -> tuple[Path, ...]:
    """Ask the recipe's teachers, where anything is trained, about all training images or those of one part."""
    if not _trains(config):
        return ()
    place = cache / "teacher_logits"
    shards = range(part, -(-data.train_images // SHARD), parts)

    def on_images(done: int, total: int) -> None:
        progress("asking the teacher", done / total, f"{done:,}/{total:,} images")

    return cache_logits(source, data, config.finetune, place, on_images, shards=shards)


def _projection(config: SearchConfig, source: nn.Module) -> Recovery | None:
    """How candidates are projected; None where they are not."""
    recovery = recovery_of(config, arch_of(source))
    return recovery if recovery is not None and recovery.project else None


def make_subspaces(config: SearchConfig, kept: LoadedSource, cache: Path, progress: Progress) -> Path | None:
    """Make what projections of the source have in common, or find it, and return its file.

    Args:
        config, cache, progress: as for ``prepare``.
        kept: what that returned.

    Returns:
        The file, or None where candidates are not projected.
    """
    recovery, place = _projection(config, kept.model), cache / "scores"
    if recovery is None:
        return None
    path, key = recovery.kept(place, kept.weights, arch_of(kept.model), kept.fingerprint)
    if Known.load(path, key) is None:
        progress(SUMS, 0.0, "")
        recovery.known(kept.model, kept.data, recovery.calibration(kept.data), place, weights=kept.weights)
        progress(SUMS, 1.0, f"{min(recovery.images, kept.data.train_images):,} images")
    return path


def _parts(config: SearchConfig, source: nn.Module, data: Data, weights: str, cache: Path, scores: int) -> int:
    """Into how many parts what is missing can be divided; 1 where the data are so few that it is not worth it."""
    if data.train_images <= SHARD:
        return 1
    place = cache / "teacher_logits"
    asked = len(missing_shards(source, data, config.finetune, place)) if _trains(config) else 0
    recovery = _projection(config, source)
    summed = recovery is None or recovery.is_summed(source, data, cache / "scores", weights)
    return max(asked, scores, 1 if recovery is None or summed else recovery.batches(data))


def _missing_source(config: SearchConfig, data: Data) -> str:
    recipe, names = config.source.train, ", ".join(score_names(config.space, config.scores.method))
    first = f"trained for {recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}, " if recipe is not None else ""
    return (
        f"the source is not in the cache: it is {first}measured on {data.report.val_images:,} images, then scored "
        f"({names}) on {config.scores.images}"
    )


def _not_made(missing: list[str], model: nn.Module, data: Data) -> NotMade:
    return NotMade("; ".join(missing), arch_of(model), content_of(data), tuple(data.describe()))


def open_checked(config: SearchConfig) -> tuple[nn.Module, Data]:
    """Create the source, not trained yet, open the data, and check all that can be checked before anything is made.

    Args:
        config: the search's configuration.

    Returns:
        (source on the CPU, data as it expects them).

    Raises:
        UserError: the data or the source are not there, do not go together, or cannot meet the budget.
    """
    check_not_in_vain(config)
    model, data = _create(config)
    arch = arch_of(model)
    _check_fit(arch, data, config)
    open_test(config, model, data)
    space = Space.check(config.space, arch, config.scores.method, projected=config.search.projects(arch))
    check_space(config, space)
    for start in _start_runs(config, model, data):
        _deciding(start.check, start)
    return model, data


def _start_runs(config: SearchConfig, model: nn.Module, data: Data, weights: str | None = None) -> list[Deciding]:
    """List the runs of ``search.start_methods``: one per method, or one per budget where it serves only one."""
    runs = list[Deciding]()
    for name, table in config.start.items():
        several = get_method(name, TrainedMethod).several
        for budgets in [table.budgets] if several else [(budget,) for budget in table.budgets]:
            runs.append(Deciding(model, data, name, budgets, table.recipe, table.settings, config.seed, weights))
    return runs


def _deciding(work: Callable[[], Made], run: Deciding) -> Made:
    """Do something with a run of a method; a UserError says which key asks for it."""
    try:
        return work()
    except UserError as error:
        raise UserError(f"search.start_methods, {run.method!r}: {error}") from error


def _create(config: SearchConfig) -> tuple[nn.Module, Data]:
    """Create the source, not trained yet, and open the data with the preprocessing that the source expects."""
    source, options = config.source, config.data.options
    local = source.model.startswith("local-dir:")
    _check_name(source.model)
    if local or not source.train:
        model = _timm_model(source, dict(source.args), {})
        check_finite(model, f"source.model = {source.model!r}")
        arch = arch_of(model)
        preprocessing = {**model.pretrained_cfg, "input_size": (arch.in_chans, *arch.img_size)}
        return model, open_data(config.data.name, preprocessing, **options)
    data = open_data(config.data.name, _preprocessing(source), **options)
    if not data.info.labelled:
        raise UserError(f"data.name = {data.info.name!r}: has no labels to train a source on; drop [source.train]")
    channels, *size = data.info.input_size
    words = {"vocabulary": data.info.vocabulary} if data.info.vocabulary else {}
    args = {"img_size": tuple(size), "in_chans": channels, "num_classes": data.info.num_classes, **words, **source.args}
    own = {"input_size": data.info.input_size, "mean": data.info.mean, "std": data.info.std}
    overlay = {} if source.pretrained else own  # pretrained weights bring the preprocessing that they were made with
    with seeded(config.seed):
        model = _timm_model(source, args, overlay)
        if source.pos_embed_std is not None:
            trunc_normal_(model.pos_embed, std=source.pos_embed_std)
    return model, data


def _preprocessing(source: SourceTable) -> dict[str, Any]:
    """Return what timm says of the preprocessing of a source that is made for the data."""
    cfg = timm.get_pretrained_cfg(source.model)
    preprocessing = cfg.to_dict() if cfg is not None else {}
    if "img_size" in source.args:
        preprocessing["input_size"] = (source.args.get("in_chans", 3), *to_2tuple(source.args["img_size"]))
    return preprocessing


def open_source_data(config: SearchConfig) -> Data:
    """Open the data as a search does, and check that they fit the source, without its weights.

    Raises:
        UserError: the data or the source are not there, or do not fit.
    """
    source, options = config.source, config.data.options
    local = source.model.startswith("local-dir:")
    _check_name(source.model)
    if source.train and not local:
        return open_data(config.data.name, _preprocessing(source), **options)
    if local:
        model = _timm_model(source, dict(source.args), {})
    else:
        with torch.device("meta"):
            model = timm.create_model(source.model, pretrained=False, **source.args)
    arch = Arch.from_timm(model)
    data = open_data(
        config.data.name, {**model.pretrained_cfg, "input_size": (arch.in_chans, *arch.img_size)}, **options
    )
    _check_fit(arch, data, config)
    return data


def _check_name(name: str) -> None:
    """Raise UserError for a name that is unknown or of another family, before anything is downloaded or built."""
    if name.startswith("local-dir:"):
        if not Path(name.removeprefix("local-dir:"), "config.json").is_file():
            raise UserError(f"source.model = {name!r}: no folder of a saved model (with a config.json) is there")
        return
    bare = name.split(".")[0]
    if not timm.is_model(bare):
        raise UserError(f"source.model = {name!r}: not a timm model. {nearest(bare, timm.list_models())}".strip())
    with torch.device("meta"):
        Arch.from_timm(timm.create_model(bare, num_classes=1000))


def _check_args(source: SourceTable, args: Mapping[str, Any]) -> None:
    """Raise UserError for keyword arguments that timm does not take or whose model has no room, on the meta device."""
    where = f"source.model = {source.model!r} with args {shown(dict(args))} cannot be made"
    depths = [args.get("depth"), *(own if isinstance(own := args.get("depths"), list | tuple) else [])]
    if any(isinstance(own, int) and own > MOST_BLOCKS for own in depths):
        raise UserError(f"{where}: it would have more than {MOST_BLOCKS:,} blocks")
    try:
        with torch.device("meta"):
            model = timm.create_model(
                source.model, pretrained=False, **{name: v for name, v in args.items() if name != "checkpoint_path"}
            )
            Arch.from_timm(model)
    except UserError:
        raise
    except Exception as error:  # timm raises whatever its parts raise; all of it follows from what the user asked for
        raise UserError(f"{where}: {error}") from error
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{where}: its weights would take {needed / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f}"
        )
    if source.pos_embed_std is not None and not isinstance(getattr(model, "pos_embed", None), nn.Parameter):
        raise UserError(
            f"source.pos_embed_std = {source.pos_embed_std:g}: {source.model!r} has no position embedding; drop it"
        )


def _timm_model(source: SourceTable, args: Mapping[str, Any], overlay: Mapping[str, Any]) -> Any:
    pretrained = source.pretrained or source.model.startswith("local-dir:")
    if not source.model.startswith("local-dir:"):
        _check_args(source, args)
    try:
        model = timm.create_model(
            source.model, pretrained=pretrained, pretrained_cfg_overlay=dict(overlay) or None, **args
        )
    except Exception as error:  # timm raises whatever its parts raise; all of it follows from what the user asked for
        raise UserError(
            f"source.model = {source.model!r} with args {shown(dict(args))} cannot be made: {error}"
        ) from error
    if source.model.startswith("local-dir:"):  # timm makes float32 of it
        model.stored_dtype = dtype_in(Path(source.model.removeprefix("local-dir:"), WEIGHTS))
    return adopted(model)


def _check_fit(arch: Arch, data: Data, config: SearchConfig) -> None:
    for name in config.space.methods or (config.scores.method,):
        if get_method(name, WidthMethod).projected and not config.search.projects(arch):
            reason = can_recover(arch) or ("it reads texts" if arch.text else "search.recover or search.project is off")
            raise UserError(
                f"method {name!r} says how many units stay, not which, so models must be projected, and here they are "
                f"not: {reason}. Take another method, one of prunesweep prune --help"
            )
    remedy = "use data that it was trained on, or train it with a [source.train] table"
    check_fits(arch, data, name="source.model", remedy=remedy)
    if arch.headless and config.search.quality is None:
        raise UserError(
            f"source.model = {config.source.model!r}: has no head, so it gives features, which no objective measures: "
            'set search.quality = "knn" or "probe" where the data have labels, or a function of your own, compute a '
            "front of it with `prunesweep instant`, or search with a classifier on it"
        )
    if not arch.headless and config.search.quality in MEASURED:
        raise UserError(
            f"search.quality = {config.search.quality!r}: is for a source without a head; this one has "
            f"{arch.outputs} classes: drop it, and take objectives top1 or balanced"
        )
    if arch.headless and config.search.rank_by == "loss":
        raise UserError("search.rank_by = 'loss': a source without a head has none; take 'auto'")
    if arch.headless and config.search.rank_by == "kl":
        raise UserError("search.rank_by = 'kl': a source without a head gives no answers; take 'auto'")
    if not data.info.labelled and config.search.quality in MEASURED:
        raise UserError(f"search.quality = {config.search.quality!r}: data.name = {data.info.name!r} has no labels")
    if not data.info.labelled and not {"agreement", *OWN} & {*config.search.objectives}:
        raise UserError(
            f"data.name = {data.info.name!r}: has no labels for objectives = {list(config.search.objectives)}: set "
            'search.objectives = ["agreement", "macs"], the agreement with the source'
        )
    if (quality := quality_of(config.search.objectives)) == ("ppl" if arch.text is None else "balanced"):
        what = "a text" if arch.text is not None else "no text"
        raise UserError(f"search.objectives has {quality!r}: {data.info.name!r} is {what}; take 'top1' or 'agreement'")
    if any(config.search.rungs or [config.finetune.epochs]):
        recipe = settled(config.finetune, data, arch, arch)
        if arch.headless:
            check_features(recipe, config.source.model)
        check_labels(data, recipe)
        _check_batch("finetune", config.finetune, data)
    if config.source.train is not None:
        _check_batch("source.train", config.source.train, data.report)
    if LEARNED in score_names(config.space, config.scores.method):
        _check_batch("gates.recipe", config.gates.recipe, data)
    if config.source.pos_embed_std is not None and not config.source.train:
        raise UserError("source.pos_embed_std would overwrite trained weights: it needs a [source.train] table")


def _check_batch(table: str, recipe: Recipe, data: Data) -> None:
    """Raise UserError for a batch that is larger than the training images."""
    only = trained_images(data.train_images, recipe)
    images = data.train_images if only is None else len(only)
    if recipe.batch_size > images:
        held = "" if only is None and data.report is data else " beside those held out"
        raise UserError(
            f"{table}.batch_size = {recipe.batch_size}: data.name = {data.info.name!r} has only "
            f"{images:,} training images{held}; lower it"
        )


def _source_key(config: SearchConfig, model: nn.Module, data: Data) -> str:
    """Digest of all that the source follows from: the model as created, the data, and how it is trained, if it is."""
    made = {"train": config.source.model_dump(mode="json"), "seed": config.seed} if config.source.train else {}
    of_model = {"weights": weights_digest(model), "arch": arch_of(model).hash}
    return digest({"format": FORMAT, **made, **of_model, "data": data.info.fingerprint})


def _source_name(config: SearchConfig, key: str) -> str:
    name = "".join(c if c.isalnum() else "_" for c in config.source.model.removeprefix("local-dir:"))[-40:]
    return f"{name}-{key}"


def _is_kept(folder: Path, key: str) -> bool:
    """Whether the source is there already, and says that it is the one of this key."""
    return (folder / "config.json").is_file() and load_provenance(folder).get("key") == key


def _make(config: SearchConfig, model: nn.Module, data: Data, folder: Path, key: str, progress: Progress) -> None:
    """Train the source where the configuration says so, measure it, and save it."""
    recipe, note = config.source.train, ""
    if recipe is not None:

        def on_step(done: int, total: int, loss: float) -> None:
            progress("training the source", done / total, f"loss {loss:.3f}{note}")

        def on_epoch(epoch: Any) -> None:
            nonlocal note
            note = f"  {EvalMetrics(epoch.top1, epoch.ppl)}"

        make_folder(folder.parent)
        state = folder.with_name(folder.name + ".state.safetensors")
        # on all training images, as a source that is brought was
        fit(model, data.report, recipe, seed=config.seed, state=state, on_step=on_step, on_epoch=on_epoch)
        as_stored(model)
    progress("evaluating the source", 0.0, "")
    found = EvalMetrics.of(evaluate_on(model, data.report, source=model))
    progress("evaluating the source", 1.0, str(found))
    facts = {"data": data.info.fingerprint, "seed": config.seed, **found.as_dict(), "versions": versions()}
    if data.report is not data:
        facts["search"] = EvalMetrics.of(evaluate_on(model, data, source=model)).as_dict()
    if data.info.labelled and found.top1 is not None and found.top1 > 100 / data.info.num_classes:
        name_classes(model, data)  # at chance the order may be another one, which must not become the model's own
    save(model, folder, {"method": "source", "source": config.source.model, "key": key, **facts})
    if recipe is not None:
        state.unlink(missing_ok=True)
