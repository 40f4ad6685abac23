"""What ``prunesweep prune`` does for each kind of method, from the source to the line that says what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from prunesweep.models import Cost, LatencyTable, UserError, arch_of, cost, load_provenance, save
from prunesweep.models.errors import nearest
from prunesweep.pruners import MACS, PARAMS, PRUNERS, Measure, latency
from prunesweep.pruners.trained import TRAINED, trained_pruner
from prunesweep.search.config import read_overrides
from prunesweep.search.report.display import Display
from prunesweep.training import EVAL_BATCH, EvalMetrics, evaluate, load_recipe, open_data
from prunesweep.training.jobs.finetune import Finetuning, finetune
from prunesweep.training.jobs.one_shot import Budget, Pruned, open_source, plan_once, prune_once, save_pruned
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.scoring import Calibration

from .finetune import reports

__all__ = ["Kind", "Request", "kind_of"]


@dataclass(frozen=True)
class Request:
    """The command's options, read."""

    source: str
    method: str
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
    calibration: Calibration
    cache: Path
    seed: int
    placement: Placement
    as_json: bool
    console: Console

    def budget(self, model: Any) -> Budget:
        """The only budget, in its measure."""
        if len(self.budgets) > 1:
            raise UserError(f"--budget: method {self.method!r} serves one in a run, got {len(self.budgets)}")
        measures: dict[str, Measure] = {"macs": MACS, "params": PARAMS}
        if self.table is not None:
            measures["latency_ms"] = latency(LatencyTable.load(self.table), arch_of(model))
        return Budget(self.budgets[0], measures[self.measure])

    @property
    def folder(self) -> Path:
        assert self.out is not None
        return self.out.absolute()

    def options(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Settings of the method, fields of the recipe, and of the finetuning's."""
        found = read_overrides(self.settings)
        tables = [found.pop(name, {}) for name in ("recipe", "finetune")]
        for name, table in zip(("recipe", "finetune"), tables, strict=True):
            if not isinstance(table, dict):
                raise UserError(f"--set {name}={table}: give --{name} {table}, or fields: --set {name}.epochs=3")
        return found, *tables


def prune_widths(request: Request) -> None:
    """Score, decide, cut; finetune where a recipe is given."""
    model = open_source(request.source)
    with Display(request.console).progress() as progress:
        pruned = prune_once(
            model,
            request.data,
            request.method,
            request.budget(model),
            drop=request.drop,
            groups=request.groups,
            floors=request.floors,
            calibration=request.calibration,
            cache=request.cache,
            progress=progress,
        )
    _finish(request, model, pruned)


def prune_tokens(request: Request) -> None:
    """Score patches, plan, and apply the plan; finetune where a recipe is given."""
    model = open_source(request.source)
    options, _, _ = request.options()
    with Display(request.console).progress() as progress:
        pruned = plan_once(
            model,
            request.data,
            keep_rate=request.keep_rate,
            budget=request.budget(model) if request.budgets else None,
            settings=options,
            calibration=request.calibration,
            cache=request.cache,
            progress=progress,
        )
    _finish(request, model, pruned)


def _finish(request: Request, model: Any, pruned: Pruned) -> None:
    wanted = request.finetune not in (None, "none")
    untrained = request.folder.with_name(f".{request.folder.name}-untrained") if wanted else request.folder
    save_pruned(pruned, untrained)
    source, first = EvalMetrics(pruned.source_top1, pruned.source_ppl), EvalMetrics(pruned.top1, pruned.ppl)
    last = first
    if wanted:
        last = _finetune(request, model, untrained, request.folder, str(request.finetune))
    _report(request, pruned.source_cost, source, [(request.folder, pruned.cost, first, last)])


def prune_trained(request: Request) -> None:
    """Train while the method decides, cut, finetune."""
    from prunesweep.training.jobs.prune_training import TrainedPruning

    method, model = trained_pruner(request.method), open_source(request.source)
    whole = cost(arch_of(model))
    shares = [b if b <= 1 else b / whole.macs for b in request.budgets]
    options, recipe, _ = request.options()
    chosen = load_recipe(request.recipe or method.recipe, recipe)
    after = request.finetune or method.finetune
    decided = request.folder if after == "none" else request.folder.with_name(f".{request.folder.name}-decided")
    run = TrainedPruning(
        model,
        request.data,
        request.method,
        shares,
        chosen,
        decided,
        options=options,
        calibration=request.calibration,
        seed=request.seed,
    )
    display = Display(request.console)
    found = run.saved_models()
    if not found:
        with display.progress() as progress:
            say = reports(display, progress, chosen.batch_size, what=f"{request.method}: deciding")
            found = run.run(request.placement, **say)
    rows = []
    for one in found:
        folder, last = request.folder / one.folder.relative_to(decided), EvalMetrics(one.top1)
        if after != "none":
            last = _finetune(request, model, one.folder, folder, after)
        rows.append((folder, one.cost, EvalMetrics(one.top1), last))
    data = open_data(request.data, model.pretrained_cfg)
    _report(request, whole, EvalMetrics.of(evaluate(model, data.val_loader(EVAL_BATCH))), rows)


def _finetune(request: Request, source: Any, start: Path, out: Path, recipe: str) -> EvalMetrics:
    """Train ``start`` with the source as teacher; the result's quality."""
    teacher = request.folder.with_name(f".{request.folder.name}-source")
    if not teacher.exists():
        save(source.cpu(), teacher)
    _, _, fields = request.options()
    job = Finetuning(start, request.data, load_recipe(recipe, fields), out, teacher=teacher, seed=request.seed)
    display = Display(request.console)
    with display.progress() as progress:
        finetune(job, request.placement, **reports(display, progress, job.recipe.batch_size))
    return EvalMetrics.of(load_provenance(out))


def _report(
    request: Request, source: Cost, before: EvalMetrics, rows: Sequence[tuple[Path, Cost, EvalMetrics, EvalMetrics]]
) -> None:
    """What came out: folder, cost, quality at first and at last; ``before`` is the source's."""
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


def tome(request: Request) -> None:
    """Evaluate the source with ToMe's merging, which no record describes and nothing is saved of."""
    from prunesweep.models.tome import apply_tome, tome_macs

    if request.r is None:
        raise UserError("--r: method 'tome' needs the number of tokens that every block merges, for example 8")
    if request.finetune not in (None, "none") or request.out is not None:
        raise UserError("method 'tome' is evaluated as it is: it takes no --finetune and saves nothing, so no --out")
    model = open_source(request.source)
    arch = arch_of(model)
    merged = apply_tome(model, request.r)
    data = open_data(request.data, model.pretrained_cfg)
    tops = [evaluate(m, data.val_loader(EVAL_BATCH))["top1"] for m in (model, merged)]
    macs, whole = tome_macs(arch, request.r), cost(arch).macs
    if request.as_json:
        print(json.dumps({"top1": tops[1], "source_top1": tops[0], "macs": macs}))
        return
    request.console.print(
        f"{macs:,} MACs ({macs / whole:.3f} of the source's), top-1 {tops[1]:.2f} % (source {tops[0]:.2f} %)",
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True)
class Kind:
    """Methods that share a way of working, and with it the options of the command that mean something to them."""

    run: Callable[[Request], None]
    options: frozenset[str]
    needs_budget: bool = False

    def check(self, method: str, given: Mapping[str, bool]) -> None:
        """Raise UserError where ``given`` has an option that means nothing here, or lacks the budget."""
        for option, is_given in given.items():
            if is_given and option not in self.options:
                raise UserError(
                    f"{option}: means nothing to method {method!r}; it takes {', '.join(sorted(self.options))}"
                )
        if self.needs_budget and not given["--budget"]:
            raise UserError(f"--budget: method {method!r} needs one, for example 0.5")


WIDTHS = Kind(prune_widths, frozenset({"--budget", "--drop", "--group", "--floor", "--measure"}), needs_budget=True)
DECIDED_IN_TRAINING = Kind(prune_trained, frozenset({"--budget", "--set", "--recipe"}), needs_budget=True)
PATCHES = Kind(prune_tokens, frozenset({"--budget", "--keep-rate", "--set", "--measure"}))
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(PRUNERS, WIDTHS),
    **dict.fromkeys(TRAINED, DECIDED_IN_TRAINING),
    "pmvit": PATCHES,
    "tome": Kind(tome, frozenset({"--r"})),
}


def kind_of(method: str) -> Kind:
    """Raises UserError for a method that there is not."""
    if method not in KINDS:
        raise UserError(f"--method {method}: must be one of {', '.join(KINDS)}. {nearest(method, KINDS)}".strip())
    return KINDS[method]
