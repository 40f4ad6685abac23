"""Prune a model by one method without training: score the source, decide for a budget, cut, measure, save."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from prunesweep.models import (
    Arch,
    Cost,
    Cut,
    UserError,
    adopted,
    arch_of,
    cost,
    cut,
    load,
    read_arch,
    save,
    weights_digest,
)
from prunesweep.models.errors import nearest
from prunesweep.models.finite import check_finite
from prunesweep.models.io.provenance import versions
from prunesweep.models.precision import as_stored, in_float32, to_float32
from prunesweep.pruners import (
    MACS,
    PARAMS,
    Measure,
    Reached,
    Scores,
    TokenMethod,
    WidthMethod,
    drop_order,
    get_method,
    meets,
    spent,
    suggestion,
)
from prunesweep.pruners.protection import Protection
from prunesweep.pruners.scores import DEPTH
from prunesweep.pruners.subspaces import can_recover, compressed_arch, projected_widths
from prunesweep.pruners.subspaces.calibration import images_of
from prunesweep.training import EVAL_BATCH, Data, EvalMetrics, evaluate_all, open_fitting, warn_at_chance

from .recovery import Recovery
from .scoring import Calibration, Progress, cached_scores

__all__ = ["Budget", "Pruned", "evaluate_shown", "open_source", "plan_once", "prune_once", "save_pruned", "to_device"]

SMALLEST = 1e-6  # a keep rate that is valid with any other setting
GIVEN = "given"  # of scores that were not made or found, but given, in provenance


@dataclass(frozen=True)
class Budget:
    """A limit on cost: a share of the source's if ``value`` is at most 1, otherwise an absolute cost in ``measure``."""

    value: float
    measure: Measure = MACS

    def limit(self, arch: Arch) -> float:
        """Return the cost that the result must not exceed, in units of ``measure``.

        Raises:
            UserError: the value is not positive, neither a share nor a cost that a model can have, or above the cost of
                ``arch``.
        """
        if not self.value > 0:
            raise UserError(f"budget = {self.value}: give a share of the source in (0, 1], or a number of MACs, ...")
        meant = suggestion(self.value)
        if meant and self.measure.name in (MACS.name, PARAMS.name):
            raise UserError(
                f"budget = {self.value:g}: a share of the source lies in (0, 1], and no model has so few "
                f"{self.measure.name}; {meant}"
            )
        whole = self.measure(arch)
        if self.value > max(whole, 1.0):
            raise UserError(
                f"budget = {self.value:,.6g}: is above the source, which has {whole:,.6g} {self.measure.name}, so "
                "nothing would be pruned: give less than that, or a share in (0, 1]"
            )
        return self.value * whole if self.value <= 1 else self.value

    def spent(self, arch: Arch, reached: Reached) -> dict[str, Any]:
        """Say what was asked for and what is spent of the cost of ``arch``, JSON-ready."""
        whole = self.measure(arch)
        return spent(self.measure.name, reached.budget, reached.cost, whole, reached.hindrance)


@dataclass(frozen=True)
class Pruned:
    """A small model with its exact cost, and what it is worth without any training.

    Args:
        source: figures of the source on the validation split.
        quality: figures of the small model on it, agreement with the source and KL among them.
        recovery: ``by`` refits or projection, with the ``images`` and the ``seed`` of their draw; ``kl`` to the source
            on the validation split, or ``cosine`` of features, and the figures of the model ``as_cut``. Where the
            family does not allow it, ``not_recovered`` is the reason; empty where none was asked for.
    """

    model: nn.Module
    source_cost: Cost
    cost: Cost
    source: EvalMetrics
    quality: EvalMetrics
    recovery: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def check_source(name: str) -> Arch:
    """Read the record of a saved folder or of a timm model, without its weights.

    Raises:
        UserError: ``name`` is neither, or the architecture is not supported.
    """
    if Path(name).exists():
        return read_arch(name)
    if not timm.is_model(name.split(".")[0]):
        hint = nearest(name.split(".")[0], timm.list_models())
        raise UserError(f"{name!r} is neither the folder of a saved model nor a timm model. {hint}".strip())
    return Arch.from_timm(name)


def open_source(name: str) -> Any:
    """Load the model in a saved folder, for work in float32, or build a timm model with its pretrained weights.

    Raises:
        UserError: ``name`` is neither, the architecture is not supported, the weights cannot be loaded,
            or a value of them is not finite.
    """
    if Path(name).exists():
        model = to_float32(load(name))
        check_finite(model, name)
        return model
    check_source(name)
    try:
        model = adopted(timm.create_model(name, pretrained=True)).eval()
    except Exception as error:  # timm passes on all errors of its parts, mostly of downloads
        raise UserError(f"the weights of {name!r} cannot be had: {error}") from error
    check_finite(model, name)
    return model


def prune_once(
    model: nn.Module,
    data: str | Data,
    method: str,
    budget: Budget,
    *,
    drop: int = 0,
    groups: Mapping[str, int] | None = None,
    floors: Mapping[str, float] | None = None,
    protect: Sequence[str] = (),
    given: Scores | None = None,
    options: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    recovery: Recovery | None = Recovery(),  # noqa: B008 (frozen)
    cache: Path,
    progress: Progress,
) -> Pruned:
    """Cut ``model`` to a budget by a method that scores widths.

    Args:
        model: the source, one of ours or one that ``Arch.from_timm`` accepts.
        data: the data set for calibration images and accuracy, or its name.
        method: name of the width method.
        budget: what the result may cost.
        drop: number of blocks to drop first, by the least importance that ``pruners.score_depth`` measures.
        groups: units per group by kind; those left out have the method's own.
        floors: share of every vector that has to stay, by kind.
        protect: what nothing touches, as for ``Protection.parse``.
        given: scores of the model by the method, in place of making or finding them (``given_scores``).
        options: settings of the method, by name.
        calibration: the images to score on.
        recovery: how the cut model is refitted, where its family allows that; None leaves it as cut.
        cache: folder of scores.
        progress: called with (what is being done, share done, note).

    Raises:
        UserError: the method cannot serve the model, a setting does not fit, or the budget cannot be met.
    """
    model, arch, entry = in_float32(model), arch_of(model), get_method(method, WidthMethod)
    entry.check(arch)
    entry.configure(options or {})
    projecting = recovery is not None and recovery.project and can_recover(arch) is None
    if entry.projected and not projecting:
        raise UserError(
            f"method {method!r} says how many units stay, not which: models must be projected to its widths"
        )
    scoring, deciding = entry.split(options or {})
    limit = budget.limit(arch)
    if not 0 <= drop < arch.depth:
        raise UserError(f"drop = {drop}: the model has {arch.depth} blocks, at least one must stay")
    if drop > arch.depth - len(arch.stages):
        raise UserError(f"drop = {drop}: {arch.depth} blocks are in {len(arch.stages)} stages, each must keep one")
    protected = Protection.parse(protect)
    protected.check(arch)
    protected = protected.with_heads() if projecting else protected
    if (free := sum(not protected.stays(i) for i in range(arch.depth))) < drop:
        raise UserError(f"drop = {drop}: only {free} blocks may be dropped, others are protected")
    opened = open_fitting(data, model)
    settings = {**_path_settings(entry, drop, groups, floors, protected), **deciding}
    calibration = calibration or Calibration()
    weights = weights_digest(model)
    to_device(model)

    def scores(of: str, **how: Any) -> tuple[Scores, str]:
        path = cached_scores(model, of, opened, calibration, cache, progress, weights=weights, **how)
        return Scores.load(path), path.name

    widths, name = scores(method, options=scoring) if given is None else (given, GIVEN)
    if drop:
        settings["dropped"] = [i for i in drop_order(scores(DEPTH)[0]) if not protected.stays(i)][:drop]
    reached = entry.decide(arch, widths, limit, measure=budget.measure, **settings)
    if projecting:
        reached = _projected(arch, reached, budget.measure)
    metadata = {"budget": budget.spent(arch, reached), "scores": name, "seed": calibration.seed}
    if options:
        metadata["settings"] = dict(options)
    if protected:
        metadata["protect"] = list(protect)
    return _make(
        model, reached.cut, opened, recovery, cache, {"method": method, "weights": weights, **metadata}, progress
    )


def plan_once(
    model: nn.Module,
    data: str | Data,
    method: str = "pmvit",
    *,
    keep_rate: float | None = None,
    budget: Budget | None = None,
    settings: Mapping[str, Any] | None = None,
    given: Scores | None = None,
    calibration: Calibration | None = None,
    recovery: Recovery | None = Recovery(),  # noqa: B008 (frozen)
    cache: Path,
    progress: Progress,
) -> Pruned:
    """Plan the tokens of ``model`` for a keep rate or for a budget.

    Args:
        model: as for ``prune_once``.
        data: as for ``prune_once``.
        method: name of the token method.
        keep_rate: share of patches that are centres, in (0, 1].
        budget: what the result may cost; give either this or ``keep_rate``.
        settings: other settings of the method, by name.
        given: as for ``prune_once``.
        calibration: as for ``prune_once``.
        recovery: as for ``prune_once``.
        cache: as for ``prune_once``.
        progress: as for ``prune_once``.

    Raises:
        UserError: not exactly one of ``keep_rate`` and ``budget`` is given, a setting does not fit, or the method
            cannot serve the model.
    """
    if (keep_rate is None) == (budget is None):
        raise UserError("give either a keep rate or a budget: each of them decides how many tokens stay")
    entry, arch, options = get_method(method, TokenMethod), arch_of(model), dict(settings or {})
    model = in_float32(model)
    entry.check(arch)
    entry.configure(options, keep_rate=SMALLEST if keep_rate is None else keep_rate)  # a budget is valid with any
    scoring, deciding = entry.split(options)
    limit = None if budget is None else budget.limit(arch)
    opened = open_fitting(data, model)
    calibration = calibration or Calibration()
    weights = weights_digest(to_device(model))
    scores, name = given, GIVEN
    if scores is None:
        path = cached_scores(model, method, opened, calibration, cache, progress, weights=weights, options=scoring)
        scores, name = Scores.load(path), path.name
    metadata: dict[str, Any] = {}
    if budget is not None and limit is not None:
        reached = entry.plan_for_budget(arch, scores, limit, measure=budget.measure, **deciding)
        decision, metadata["budget"] = reached.cut, budget.spent(arch, reached)
    else:
        assert keep_rate is not None
        decision = entry.plan(arch, scores, keep_rate, **deciding)
    metadata |= {
        "keep_rate": keep_rate,
        "settings": options,
        "scores": name,
        "seed": calibration.seed,
    }
    return _make(model, decision, opened, recovery, cache, {"method": method, "weights": weights, **metadata}, progress)


def _make(
    model: nn.Module,
    decision: Cut,
    data: Data,
    recovery: Recovery | None,
    cache: Path,
    metadata: Mapping[str, Any],
    progress: Progress,
) -> Pruned:
    """Cut the model and refit what is left; measure the source, the cut model and the refitted one."""
    arch, small = arch_of(model), cut(model, decision)
    as_stored(small)
    weights = metadata["weights"]
    metadata = {**metadata, "source": {"name": arch.source, "weights": weights}}
    reason = None if recovery is None else can_recover(arch)
    if recovery is None or reason is not None:
        before, after = evaluate_shown([model, small], data, progress, source=model)
        facts: dict[str, Any] = {} if reason is None else {"not_recovered": reason}
    else:

        def on_block(done: int, total: int) -> None:
            progress("recovering", done / total, f"{done}/{total} blocks")

        images = images_of(recovery.calibration(data), arch)
        known = recovery.known(model, data, images, cache, weights=weights) if recovery.project else None
        plain, small = small, recovery.model(model, decision, images, known=known, progress=on_block)
        as_stored(small)
        before, as_cut, after = evaluate_shown([model, plain, small], data, progress, source=model)
        facts = {
            "by": "projection" if recovery.project else "refits",
            "images": min(recovery.images, data.train_images),
            "seed": recovery.seed,
            "as_cut": EvalMetrics.of(as_cut).as_dict(),
            **{name: after[name] for name in ("kl", "cosine") if name in after},
        }
    return Pruned(
        model=small,
        source_cost=cost(arch),
        cost=cost(arch_of(small)),
        source=EvalMetrics.of(before),
        quality=EvalMetrics.of(after),
        recovery=facts,
        provenance={**metadata, "recovery": facts, "data": data.info.fingerprint, "versions": versions()},
    )


def _projected(arch: Arch, reached: Reached, measure: Measure) -> Reached:
    """Return what was reached with the cost of the projected model, whose heads all stay."""
    spent = measure(compressed_arch(arch, projected_widths(arch, reached.cut)))
    missed = "" if meets(spent, reached.budget) else "projected ranks are whole channels, shared out among all heads"
    return dataclasses.replace(reached, cost=spent, hindrance=reached.hindrance or missed)


def _path_settings(
    method: WidthMethod,
    drop: int,
    groups: Mapping[str, int] | None,
    floors: Mapping[str, float] | None,
    protected: Protection,
) -> dict[str, Any]:
    """Return the settings, besides the budget, of a method's path of widths."""
    if method.along_path:
        return {"groups": {**method.groups, **(groups or {})}, "floors": floors, "protected": protected}
    if drop or groups or floors or protected:
        raise UserError(
            f"method {method.name!r} decides by ratios per structure: it takes no drop, groups, floors or protect"
        )
    return {}


def to_device(model: nn.Module) -> nn.Module:
    """Move ``model`` to a GPU if there is one, and return it."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def evaluate_shown(
    models: Sequence[nn.Module], data: Data, progress: Progress, *, source: nn.Module
) -> list[dict[str, float]]:
    """Measure models on the validation split in one pass, in which the source runs once, and show how far it is.

    A source that is no better than chance is warned of.

    Args:
        models: as for ``evaluate_all``; the source may be among them.
        data: the data set.
        progress: called with (what is being done, share done, note).
        source: the model to compare with.

    Returns:
        ``evaluate``'s figures of every model.
    """
    loader = data.val_loader(EVAL_BATCH)

    def batches() -> Iterator[Any]:
        for number, batch in enumerate(loader):
            progress("evaluating", number / len(loader), f"batch {number + 1} of {len(loader)}")
            yield batch

    found = evaluate_all(models, batches(), source=source)
    progress("evaluating", 1.0, ", ".join(str(EvalMetrics.of(one)) for one in found))
    for model, figures in zip(models, found, strict=True):
        if model is source:
            warn_at_chance(arch_of(model).source, model, data, EvalMetrics.of(figures))
    return found


def save_pruned(pruned: Pruned, out: Path) -> Path:
    """Save the cut model with its provenance in the folder ``out``, and return the folder."""
    return save(pruned.model.cpu(), out, {**pruned.provenance, **pruned.quality.as_dict()})
