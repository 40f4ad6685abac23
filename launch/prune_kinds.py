"""Run ``prunesweep prune`` for each class of methods, from the source to the line that reports the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from prunesweep.models import Cost, LatencyTable, UserError, arch_of, cost, load_provenance, save, weights_digest
from prunesweep.models.errors import nearest
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions
from prunesweep.pruners import (
    MACS,
    METHODS,
    PARAMS,
    AppliedMethod,
    Measure,
    Method,
    TokenMethod,
    TrainedMethod,
    WidthMethod,
    latency,
)
from prunesweep.search.config import read_overrides
from prunesweep.search.report.display import Display
from prunesweep.training import EVAL_BATCH, EvalMetrics, evaluate, load_recipe, open_data
from prunesweep.training.jobs.finetune import Finetuning, finetune
from prunesweep.training.jobs.one_shot import Budget, Pruned, open_source, plan_once, prune_once, save_pruned
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.scoring import Calibration
from prunesweep.training.jobs.work import Work, model_facts
from prunesweep.training.second_stage import SecondStageJob

from .finetune import reports

__all__ = ["Request", "Runner", "find_method", "means", "runner_of"]

STAGE = "second_stage"  # prefix of --set for settings of a method's own finetuning
DECIDED = "decided.json"  # in the command's folder of work, once all models are there that the method has decided on


@dataclass(frozen=True)
class Request:
    """The parsed options of the command."""

    source: str
    method: Method
    data: str
    out: Path | None
    budgets: Sequence[float]
    keep_rate: float | None
    r: int | None
    measure: str
    table: Path | None
    drop: int
    groups: Mapping[str, int]
    floors: Mapping[str, float]
    settings: Sequence[str]
    recipe: str | None
    finetune: str | None
    second_stage: bool
    calibration: Calibration
    cache: Path
    seed: int
    placement: Placement
    as_json: bool
    console: Console

    def budget(self, model: Any) -> Budget:
        """Return the only budget, in its measure.

        Args:
            model: the source; a latency table is read for its architecture.

        Raises:
            UserError: there are several budgets.
        """
        if len(self.budgets) > 1:
            raise UserError(f"--budget: method {self.method.name!r} serves one in a run, got {len(self.budgets)}")
        measures: dict[str, Measure] = {"macs": MACS, "params": PARAMS}
        if self.table is not None:
            measures["latency_ms"] = latency(LatencyTable.load(self.table), arch_of(model))
        return Budget(self.budgets[0], measures[self.measure])

    @property
    def folder(self) -> Path:
        """Absolute path of the result."""
        assert self.out is not None
        return self.out.absolute()

    def options(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return the settings of the method, the fields of ``recipe`` and those of ``finetune`` that ``--set`` gives.

        Raises:
            UserError: ``recipe`` or ``finetune`` is set to a value instead of fields.
        """
        found = read_overrides(self.settings)
        found.pop(STAGE, None)
        tables = [found.pop(name, {}) for name in ("recipe", "finetune")]
        for name, table in zip(("recipe", "finetune"), tables, strict=True):
            if not isinstance(table, dict):
                raise UserError(f"--set {name}={table}: give --{name} {table}, or fields: --set {name}.epochs=3")
        return found, *tables

    @property
    def stage(self) -> SecondStageJob | None:
        """The method's own way of finetuning if ``--second-stage`` is given, otherwise None."""
        table = read_overrides(self.settings).get(STAGE, {})
        if not isinstance(table, dict) or (table and not self.second_stage):
            raise UserError(f"--set {STAGE}...: these settings go with --second-stage, as {STAGE}.NAME=VALUE")
        return SecondStageJob(self.method.name, table) if self.second_stage else None

    def work(self, model: Any, fingerprint: str) -> Work:
        """The hidden folder of what the command has not finished, found by all that its result depends on.

        Args:
            model: the source, opened.
            fingerprint: of the data.
        """
        _, recipe, finetune = self.options()
        after = self.finetune or self.method.finetune or "none"
        deciding = self.recipe or self.method.recipe if isinstance(self.method, TrainedMethod) else None
        facts = {
            "command": "prune",
            "method": self.method.name,
            "source": {"name": arch_of(model).source, **model_facts(model)},
            "data": {"name": self.data, "fingerprint": fingerprint},
            "budgets": list(self.budgets),
            "keep_rate": self.keep_rate,
            "measure": self.measure,
            "table": self.table and hashlib.sha256(self.table.read_bytes()).hexdigest(),
            "drop": self.drop,
            "groups": dict(self.groups),
            "floors": dict(self.floors),
            "settings": list(self.settings),
            "recipe": None if deciding is None else _recipe(deciding, recipe),
            "finetune": None if after == "none" else _recipe(after, finetune),
            "second_stage": self.second_stage,
            "calibration": asdict(self.calibration),
            "seed": self.seed,
        }
        return Work.beside(self.folder, facts)

    def check_stage(self) -> None:
        """Raise UserError if a setting of the second stage is not allowed, or nothing is finetuned."""
        stage = self.stage
        if stage is None:
            return
        stage.configure()
        if (self.finetune or self.method.finetune or "none") == "none":
            raise UserError(f"--second-stage: is finetuning; give a recipe, for example --finetune {self.method.name}")


def _recipe(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return load_recipe(name, fields).model_dump(mode="json")


def prune_widths(request: Request) -> None:
    """Score, decide and cut; finetune if a recipe is given."""
    model = open_source(request.source)
    options, _, _ = request.options()
    with Display(request.console).progress() as progress:
        pruned = prune_once(
            model,
            request.data,
            request.method.name,
            request.budget(model),
            drop=request.drop,
            groups=request.groups,
            floors=request.floors,
            options=options,
            calibration=request.calibration,
            cache=request.cache,
            progress=progress,
        )
    _finish(request, model, pruned)


def prune_tokens(request: Request) -> None:
    """Score patches, plan tokens and apply the plan; finetune if a recipe is given."""
    model = open_source(request.source)
    options, _, _ = request.options()
    with Display(request.console).progress() as progress:
        pruned = plan_once(
            model,
            request.data,
            request.method.name,
            keep_rate=request.keep_rate,
            budget=request.budget(model) if request.budgets else None,
            settings=options,
            calibration=request.calibration,
            cache=request.cache,
            progress=progress,
        )
    _finish(request, model, pruned)


def _finish(request: Request, model: Any, pruned: Pruned) -> None:
    source, first = EvalMetrics(pruned.source_top1, pruned.source_ppl), EvalMetrics(pruned.top1, pruned.ppl)
    last = first
    if request.finetune in (None, "none"):
        save_pruned(pruned, request.folder)
    else:
        work = request.work(model, pruned.provenance["data"])
        work.claim()
        untrained = save_pruned(pruned, work.folder / "untrained")
        last = _finetune(request, model, untrained, request.folder, work.folder, str(request.finetune))
        work.release()
    _report(request, pruned.source_cost, source, [(request.folder, pruned.cost, first, last)])


def prune_trained(request: Request) -> None:
    """Train while the method decides, cut, and finetune."""
    from prunesweep.training.jobs.prune_training import TrainedPruning

    method, model = request.method, open_source(request.source)
    assert isinstance(method, TrainedMethod)
    whole = cost(arch_of(model))
    shares = [b if b <= 1 else b / whole.macs for b in request.budgets]
    options, recipe, _ = request.options()
    chosen = load_recipe(request.recipe or method.recipe, recipe)
    after = request.finetune or method.finetune
    data = open_data(request.data, model.pretrained_cfg)
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
        work_folder=work.folder / "deciding",
    )
    run.check()
    work.claim()
    display = Display(request.console)
    if (work.folder / DECIDED).exists() and after != "none":
        found = run.saved_models()
    else:
        with display.progress() as progress:
            say = reports(display, progress, chosen.batch_size, what=f"{method.name}: deciding")
            found = run.run(request.placement, **say)
        write_text(work.folder / DECIDED, "{}")  # a folder of several models may be there in part only
    rows = []
    for one in found:
        folder, last = request.folder / one.folder.relative_to(decided), EvalMetrics(one.top1)
        if after != "none":
            last = _finetune(request, model, one.folder, folder, work.folder, after)
        rows.append((folder, one.cost, EvalMetrics(one.top1), last))
    work.release()
    _report(request, whole, EvalMetrics.of(evaluate(model, data.val_loader(EVAL_BATCH))), rows)


def _finetune(request: Request, source: Any, start: Path, out: Path, work: Path, recipe: str) -> EvalMetrics:
    """Train ``start`` with the source as teacher; return the result's quality. ``work`` is the command's folder."""
    teacher = work / "source"
    if not teacher.exists():
        save(source.cpu(), teacher)
    _, _, fields = request.options()
    part = "" if out == request.folder else f"-{out.name}"
    job = Finetuning(
        start,
        request.data,
        load_recipe(recipe, fields),
        out,
        teacher=teacher,
        seed=request.seed,
        second_stage=request.stage,
        work_folder=work / f"finetuning{part}",
        teacher_logits=work / "teacher_logits",
    )
    display = Display(request.console)
    with display.progress() as progress:
        finetune(job, request.placement, **reports(display, progress, job.recipe.batch_size))
    return EvalMetrics.of(load_provenance(out))


def _report(
    request: Request, source: Cost, before: EvalMetrics, rows: Sequence[tuple[Path, Cost, EvalMetrics, EvalMetrics]]
) -> None:
    """Report every result: folder, cost, quality before and after finetuning; ``before`` is the source's quality."""
    if request.as_json:
        facts = [
            {**_named("source_", before), **found.as_dict(), **_named("untrained_", first)}
            | {"macs": own.macs, "params": own.params, "model": str(folder)}
            for folder, own, first, found in rows
        ]
        print(json.dumps(facts[0] if len(facts) == 1 else facts))
        return
    for folder, own, first, found in rows:
        untrained = f"{first} without finetuning, " if found != first else ""
        request.console.print(
            f"{own.macs:,} MACs ({own.macs / source.macs:.3f} of the source's), "
            f"{own.params:,} params ({own.params / source.params:.3f})\n"
            f"{found} ({untrained}source {before}); saved as {folder}",
            highlight=False,
            soft_wrap=True,
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
    model = open_source(request.source)
    arch = arch_of(model)
    method.check(arch)
    options, _, _ = request.options()
    applied = method.apply(model, method.configure(options if request.r is None else {**options, "r": request.r}))
    data = open_data(request.data, model.pretrained_cfg)
    before, after = (EvalMetrics.of(evaluate(m, data.val_loader(EVAL_BATCH))) for m in (model, applied.model))
    if not method.saved:
        _report_unsaved(request, cost(arch), before, after, applied.macs or cost(arch).macs)
        return
    facts: dict[str, Any] = {"method": method.name, "source": {"name": arch.source, "weights": weights_digest(model)}}
    facts |= {"change": dict(applied.facts), "data": data.info.fingerprint, "versions": versions(), **after.as_dict()}
    save(applied.model, request.folder, facts)
    _report(request, cost(arch), before, [(request.folder, cost(arch), after, after)])


def _report_unsaved(request: Request, source: Cost, before: EvalMetrics, after: EvalMetrics, macs: int) -> None:
    if request.as_json:
        print(json.dumps({**after.as_dict(), **_named("source_", before), "macs": macs}))
        return
    request.console.print(
        f"{macs:,} MACs ({macs / source.macs:.3f} of the source's), {after} (source {before})",
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True)
class Runner:
    """How the command runs methods of one class, and which of its options apply to them."""

    run: Callable[[Request], None]
    options: frozenset[str]
    needs_budget: bool = False

    def check(self, method: Method, given: Mapping[str, bool]) -> None:
        """Check the given options.

        Args:
            method: the method.
            given: by the option's name, whether it was given.

        Raises:
            UserError: an option does not apply to the method, or its budget is missing.
        """
        allowed = {*self.options}
        allowed |= {"--set"} if method.option_names and self.run is not apply_once else set()
        allowed |= {"--r"} if "r" in method.option_names else set()
        allowed |= {"--second-stage"} if method.second_stage is not None else set()
        for option, is_given in given.items():
            if is_given and option not in allowed:
                takes = f"it takes {', '.join(sorted(allowed))}" if allowed else "it takes no options of its own"
                raise UserError(f"{option}: means nothing to method {method.name!r}; {takes}")
        if self.needs_budget and not given["--budget"]:
            raise UserError(f"--budget: method {method.name!r} needs one, for example 0.5")

    def saves(self, method: Method) -> bool:
        """Return True if the method has a result that is saved."""
        return not isinstance(method, AppliedMethod) or method.saved


RUNNERS: Mapping[type[Method], Runner] = {
    WidthMethod: Runner(
        prune_widths, frozenset({"--budget", "--drop", "--group", "--floor", "--measure"}), needs_budget=True
    ),
    TrainedMethod: Runner(prune_trained, frozenset({"--budget", "--set", "--recipe"}), needs_budget=True),
    TokenMethod: Runner(prune_tokens, frozenset({"--budget", "--keep-rate", "--measure"})),
    AppliedMethod: Runner(apply_once, frozenset()),
}


def runner_of(method: Method) -> Runner:
    """Return the runner of a method's class."""
    return next(runner for kind, runner in RUNNERS.items() if isinstance(method, kind))


def find_method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"--method {name}: must be one of {', '.join(METHODS)}. {nearest(name, METHODS)}".strip())
    return METHODS[name]


def means(settings: Sequence[str], runner: Runner) -> bool:
    """Return True if ``--set`` has a setting of the method itself, not of the training that follows.

    Args:
        settings: the values of ``--set``, ``NAME=VALUE``.
        runner: the method's runner.
    """
    later = ("finetune.", f"{STAGE}.") if runner.run is not apply_once else ()
    return any(not setting.strip().startswith(later) for setting in settings)
