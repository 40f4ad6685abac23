"""Run ``prunesweep prune`` for each class of methods, from the source to the lines that report the results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunesweep.models import Cost, UserError, arch_of, cost, load_provenance, save, weights_digest
from prunesweep.models.io.files import publish, write_text
from prunesweep.models.io.provenance import versions
from prunesweep.pruners import AppliedMethod, TrainedMethod
from prunesweep.search.report.display import Display
from prunesweep.training import EvalMetrics, evaluate_on, load_recipe, warn_at_chance
from prunesweep.training.jobs.finetune import Finetuning, finetune
from prunesweep.training.jobs.one_shot import (
    Budget,
    Pruned,
    evaluate_shown,
    plan_once,
    prune_once,
    save_pruned,
)
from prunesweep.training.jobs.prune_training import TrainedPruning
from prunesweep.training.jobs.work import Work

from .finetune import reports
from .next_commands import after_model, show_next
from .prune_request import Request
from .spent import spent_lines

__all__ = ["apply_once", "prune_tokens", "prune_trained", "prune_widths"]

FINETUNED = "finetuned"  # folder in the command's folder of work, of models that are trained
DECIDED = "decided.json"  # in the command's folder of work, once all models are there that the method has decided on


@dataclass(frozen=True)
class Row:
    """One result: folder, exact cost, quality before and after finetuning, what its budget was, how it recovered."""

    folder: Path
    cost: Cost
    untrained: EvalMetrics
    final: EvalMetrics
    spent: Mapping[str, Any] = field(default_factory=dict)  # as ``pruners.spent`` gives it
    recovery: Mapping[str, Any] = field(default_factory=dict)  # as in ``Pruned``


def prune_widths(request: Request) -> None:
    """Score, decide and cut; finetune if a recipe is given."""
    model = request.model()
    options, _, _ = request.options()
    with Display(request.console).progress() as progress:
        pruned = prune_once(
            model,
            request.opened(model),
            request.method.name,
            request.budget(model),
            drop=request.drop,
            groups=request.groups,
            floors=request.floors,
            protect=request.protect,
            given=request.given(model, options),
            options=options,
            calibration=request.calibration,
            recovery=request.recovery(model),
            cache=request.cache,
            progress=progress,
        )
    _finish(request, model, pruned)


def prune_tokens(request: Request) -> None:
    """Score patches, plan tokens and apply the plan; finetune if a recipe is given."""
    model = request.model()
    options, _, _ = request.options()
    with Display(request.console).progress() as progress:
        pruned = plan_once(
            model,
            request.opened(model),
            request.method.name,
            keep_rate=request.keep_rate,
            budget=request.budget(model) if request.budgets else None,
            settings=options,
            given=request.given(model, options),
            calibration=request.calibration,
            recovery=request.recovery(model),
            cache=request.cache,
            progress=progress,
        )
    _finish(request, model, pruned)


def _finish(request: Request, model: Any, pruned: Pruned) -> None:
    last = first = pruned.quality
    if request.finetune in (None, "none"):
        save_pruned(pruned, request.folder)
    else:
        work = request.work(model, pruned.provenance["data"])
        with work.held():
            untrained = save_pruned(pruned, work.folder / "untrained")
            last = _finetune(request, model, untrained, work, ".", str(request.finetune))
            publish(work.folder / FINETUNED, request.folder, replace=False)
    _report(request, pruned.source_cost, pruned.source, [_row(request, pruned, first, last)])


def _row(request: Request, pruned: Pruned, first: EvalMetrics, last: EvalMetrics) -> Row:
    return Row(request.folder, pruned.cost, first, last, pruned.provenance.get("budget", {}), pruned.recovery)


def prune_trained(request: Request) -> None:
    """Train while the method decides, cut, and finetune."""
    method, model = request.method, request.model()
    assert isinstance(method, TrainedMethod)
    whole = cost(arch_of(model))
    shares = [Budget(budget).limit(arch_of(model)) / whole.macs for budget in request.budgets]
    options, recipe, finetuning = request.options()
    chosen = load_recipe(str(request.deciding), recipe)
    after = request.after
    data = request.opened(model)
    work = request.work(model, data.info.fingerprint)
    decided = request.folder if after == "none" else work.folder / "decided"
    run = TrainedPruning(
        model,
        request.data,
        method.name,
        shares,
        chosen,
        decided,
        options=options,
        calibration=request.calibration,
        seed=request.seed,
        data_options=request.data_options,
        work_folder=work.folder / "deciding",
    )
    run.check()
    before = EvalMetrics.of(evaluate_on(model, data, source=model))
    warn_at_chance(request.source, model, data, before)
    display = Display(request.console)
    display.note(
        f"{method.name} decides while it trains: {chosen.epochs} epochs of recipe {request.deciding}"
        + ("" if after == "none" else f", then {load_recipe(after, finetuning).epochs} of {after}, for each budget")
        + "; --recipe, --finetune and --set recipe.epochs=3 change that"
    )
    rows = []
    with work.held():
        if (work.folder / DECIDED).exists() and after != "none":
            found = run.saved_models()
        else:
            with display.progress() as progress:
                say = reports(display, progress, chosen.batch_size, what=f"{method.name}: deciding")
                found = run.run(request.placement, **say)
            write_text(work.folder / DECIDED, "{}")  # a folder of several models may be there in part only
        for one in found:
            name, last = one.folder.relative_to(decided), EvalMetrics(one.top1)
            if after != "none":
                last = _finetune(request, model, one.folder, work, str(name), after)
            rows.append(Row(request.folder / name, one.cost, EvalMetrics(one.top1), last, one.spent))
        if after != "none":
            publish(work.folder / FINETUNED, request.folder, replace=False)
    _report(request, whole, before, rows)
    for missed in sorted({*shares}, reverse=True)[len(found) :]:  # the largest are reached first
        request.console.print(
            f"budget {missed:.4g}: was not reached in {chosen.epochs} epochs; nothing was saved", highlight=False
        )


def _finetune(request: Request, source: Any, start: Path, work: Work, name: str, recipe: str) -> EvalMetrics:
    """Train ``start`` with the source as teacher, unless that is done; return the result's quality.

    The result lies in the command's folder of work until all of them are there: a command that is killed in between
    leaves none that another could take for all.
    """
    out, teacher = work.folder / FINETUNED / name, work.folder / "source"
    if out.joinpath("config.json").exists():
        return EvalMetrics.of(load_provenance(out))
    if not teacher.exists():
        save(source.cpu(), teacher)
    _, _, fields = request.options()
    part = "" if name == "." else f"-{name}"
    job = Finetuning(
        start,
        request.data,
        load_recipe(recipe, fields),
        out,
        teacher=teacher,
        seed=request.seed,
        data_options=request.data_options,
        second_stage=request.stage,
        work_folder=work.folder / f"finetuning{part}",
        teacher_logits=work.folder / "teacher_logits",
    )
    display = Display(request.console)
    with display.progress() as progress:
        finetune(job, request.placement, **reports(display, progress, job.recipe.batch_size))
    return EvalMetrics.of(load_provenance(out))


def _report(request: Request, source: Cost, before: EvalMetrics, rows: Sequence[Row]) -> None:
    """Report every result; ``before`` is the source's quality."""
    if request.as_json:
        facts = [
            {**_named("source_", before), **row.final.as_dict(), **_named("untrained_", row.untrained)}
            | {"macs": row.cost.macs, "params": row.cost.params, "model": str(row.folder)}
            | ({"budget": row.spent} if row.spent else {})
            | ({"recovery": row.recovery} if row.recovery else {})
            for row in rows
        ]
        print(json.dumps(facts[0] if len(facts) == 1 else facts))
        return
    for row in rows:
        untrained = f"{row.untrained} without finetuning, " if row.final != row.untrained else ""
        request.console.print(
            f"{row.cost.macs:,} MACs ({row.cost.macs / source.macs:.3f} of the source's), "
            f"{row.cost.params:,} params ({row.cost.params / source.params:.3f})\n"
            f"{row.final} ({untrained}source {before}); saved as {row.folder}",
            highlight=False,
            soft_wrap=True,
        )
        for line in (*spent_lines(row.spent), *([_recovered(row.recovery)] if row.recovery else [])):
            request.console.print(line, highlight=False, soft_wrap=True, markup=False)
    for last in rows[-1:]:
        data = request.data if last.final == last.untrained else None
        show_next(request.console, list(after_model(str(last.folder), request.source, data)))


def _recovered(facts: Mapping[str, Any]) -> str:
    """Say how a result was recovered and what that brought, or why it was not."""
    if "not_recovered" in facts:
        return f"left as cut, not recovered: {facts['not_recovered']}"
    cut = facts["as_cut"]
    name, what = ("kl", "KL to the source") if "kl" in facts else ("cosine", "cosine to the source's features")
    return (
        f"recovered by {facts['by']} on {facts['images']:,} images: {what} {cut[name]:.4g} -> {facts[name]:.4g}, "
        f"as cut {EvalMetrics.of(cut)}"
    )


def _named(prefix: str, found: EvalMetrics) -> dict[str, float]:
    return {prefix + name: value for name, value in found.as_dict().items()}


def apply_once(request: Request) -> None:
    """Change the source at once and measure it before and after; save it if an architecture record can describe it."""
    method = request.method
    assert isinstance(method, AppliedMethod)
    if "r" in method.option_names and request.r is None:
        raise UserError(f"--r: method {method.name!r} needs the number of tokens that every block merges, e.g. 8")
    if request.finetune not in (None, "none") or (request.out is not None and not method.saved):
        raise UserError(
            f"method {method.name!r} is evaluated as it is: it takes no --finetune"
            + ("" if method.saved else " and saves nothing, so no --out")
        )
    model = request.model()
    arch = arch_of(model)
    method.check(arch)
    options, _, _ = request.options()
    settings = method.configure(options if request.r is None else {**options, "r": request.r})
    data = request.opened(model)
    applied = method.apply(model, settings)
    with Display(request.console).progress() as progress:
        found = evaluate_shown([model, applied.model], data, progress, source=model)
    before, after = map(EvalMetrics.of, found)
    if not method.saved:
        _report_unsaved(request, cost(arch), before, after, applied.macs or cost(arch).macs)
        return
    facts: dict[str, Any] = {"method": method.name, "source": {"name": arch.source, "weights": weights_digest(model)}}
    facts |= {"change": dict(applied.facts), "data": data.info.fingerprint, "versions": versions(), **after.as_dict()}
    save(applied.model, request.folder, facts)
    _report(request, cost(arch), before, [Row(request.folder, cost(arch), after, after)])


def _report_unsaved(request: Request, source: Cost, before: EvalMetrics, after: EvalMetrics, macs: int) -> None:
    if request.as_json:
        print(json.dumps({**after.as_dict(), **_named("source_", before), "macs": macs}))
        return
    request.console.print(
        f"{macs:,} MACs ({macs / source.macs:.3f} of the source's), {after} (source {before})",
        highlight=False,
        soft_wrap=True,
    )
