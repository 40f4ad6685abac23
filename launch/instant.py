"""``prunesweep instant``: a front of smaller models, computed without labels and without training."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .data_options import (
    UNREADABLE,
    ClassesOption,
    ClassOrderOption,
    UnreadableOption,
    check_data,
    data_options,
)
from .protect import ProtectOption, check_protected

if TYPE_CHECKING:
    from rich.console import Console

    from prunesweep.models import Arch, LatencyTable
    from prunesweep.models.latency.timing import Setting

__all__ = ["instant", "print_computed", "show_front"]

BATCH = 64  # images per calibration batch, and per batch whose latency is measured
NOT_KEPT = ("macs", "params", "macs_share", "model")  # of a row, in a model's provenance, as its record says them


def instant(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="folder of a saved model, or a timm name", show_default=False)],
    data: Annotated[
        str,
        typer.Option(help="digits, glyphs, imagefolder:PATH, images:PATH, wds:PATH or hfds:NAME", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="folder of the front, which must not exist yet", show_default=False)],
    budgets: Annotated[
        str, typer.Option(help="shares of the source's cost, separated by commas")
    ] = "0.9,0.7,0.5,0.3,0.15",
    objective: Annotated[
        str, typer.Option(help="what the budgets are counted in: macs, params or latency_ms")
    ] = "macs",
    table: Annotated[
        Path | None, typer.Option(help="latency table of `prunesweep latency`, for latency_ms", show_default=False)
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(help="latency_ms: measure the latency of the source and of every point here", show_default=False),
    ] = None,
    align: Annotated[int, typer.Option(min=1, help="widths are multiples of it; 8 suits GPUs")] = 1,
    protect: ProtectOption = None,
    images: Annotated[
        int, typer.Option(min=2, help="calibration images, from the training split, without labels")
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, help="of the choice of calibration images")] = 0,
    class_order: ClassOrderOption = None,
    classes: ClassesOption = None,
    unreadable: UnreadableOption = UNREADABLE,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Compute a front of smaller models from a few hundred unlabelled images; nothing is trained."""
    from prunesweep.models import LatencyTable, UserError, arch_of
    from prunesweep.models.io.files import publish_folder
    from prunesweep.models.io.lock import reserve
    from prunesweep.models.precision import as_stored
    from prunesweep.pruners import latency
    from prunesweep.pruners.subspaces import can_recover
    from prunesweep.pruners.subspaces import instant as compute
    from prunesweep.search.report.display import Display
    from prunesweep.training import open_fitting
    from prunesweep.training.jobs.one_shot import check_source, evaluate_shown, open_source

    from .console import PlainConsole
    from .next_commands import after_model, show_next

    shares = _shares(budgets)
    context.with_resource(reserve(out))
    if objective not in ("macs", "params", "latency_ms"):
        raise UserError(f"--objective {objective}: must be one of macs, params, latency_ms")
    if (table is None) == (objective == "latency_ms"):
        raise UserError("--objective latency_ms and --table TABLE go together; `prunesweep latency` measures a table")
    if measure not in (None, "latency_ms"):
        raise UserError(f"--measure {measure}: must be latency_ms; what budgets are counted in is --objective")
    options = data_options(class_order, classes, unreadable)
    check_data(data, options)
    predictor = None if table is None else LatencyTable.load(table)
    setting = _setting(predictor) if measure else None
    arch = check_source(source)
    if reason := can_recover(arch):
        raise UserError(f"{source}: cannot be projected: {reason}{_instead(source, arch)}")
    protected = check_protected(protect, source)
    model = open_source(source)
    budgeted: Any = objective if predictor is None else latency(predictor, arch_of(model))
    dataset = open_fitting(data, model, **options)
    console = PlainConsole(stderr=as_json)
    display = Display(console)
    display.data(dataset.describe())
    if images > dataset.train_images:
        display.note(f"--images {images}: there are {dataset.train_images:,} training images, all are used")
        images = dataset.train_images
    batches = dataset.calibration_loader(images, min(BATCH, max(1, images // 4)), seed)
    with display.progress() as report:

        def progress(what: str, done: int, total: int) -> None:
            report(what, done / total, "done" if done == total else "")

        points = compute(model, batches, shares, objective=budgeted, align=align, protect=protected, progress=progress)
        if not points:
            raise UserError(
                f"--budgets {budgets}: the smallest widths, in steps of {align}, cost more; give larger ones"
            )
        for point in points:
            as_stored(point.model)
        models = [model, *(point.model for point in points)]
        found = evaluate_shown(models, dataset, report, source=model)
        timings = [None] * len(models) if setting is None else _timed(models, setting, progress)
    rows = [
        _row(budget, own, arch_of(model), figures, timing, predictor)
        for budget, own, figures, timing in zip([1.0, *(p.budget for p in points)], models, found, timings, strict=True)
    ]
    for row in rows[1:]:
        row["model"] = f"{row['budget']:g}"
        row["spent"] = _spent(row, rows[0], objective, align)
    facts: dict[str, Any] = {"source": source, "data": data, "objective": objective, "images": images, "seed": seed}
    facts |= {"protect": protected} if protected else {}
    facts |= {"peak_memory_mib": _peak_memory(), "points": rows}
    with publish_folder(out.absolute()) as folder:
        _save(folder, facts, models, dataset.info.fingerprint)
    if as_json:
        print(json.dumps(facts))
        return
    show_front(console, facts, out, [share for share in shares if share not in {p.budget for p in points}])
    show_next(console, list(after_model(str(out / rows[-1]["model"]), source, data)))


def _instead(source: str, arch: Arch) -> str:
    """Name the methods that cut a source which cannot be projected."""
    from prunesweep.pruners import METHODS, WidthMethod

    able = [
        n for n, m in METHODS.items() if isinstance(m, WidthMethod) and not m.projected and arch.family in m.families
    ]
    others = ", ".join(name for name in able if name not in ("taylor", "random"))
    best = f"prunesweep prune {source} --method taylor (or {others})"
    return f". Cut it by scores, and finetune it: {best}" if "taylor" in able else ""


def _shares(text: str) -> list[float]:
    from prunesweep.models import UserError

    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--budgets {text}: must be numbers separated by commas, for example 0.5,0.3") from None
    if len({f"{share:g}" for share in shares}) < len(shares):
        raise UserError(f"--budgets {text}: names one twice, and every model's folder has its budget's name")
    return shares


def _spent(row: dict[str, Any], source: dict[str, Any], objective: str, align: int) -> dict[str, Any]:
    """Say what a budget was and what is spent of it."""
    from prunesweep.pruners import meets, spent

    whole = source[objective]
    limit = row["budget"] * whole
    missed = "" if meets(row[objective], limit) else f"the next widths, in steps of {align}, cost more"
    return spent(objective, limit, row[objective], whole, missed)


def _save(folder: Path, facts: dict[str, Any], models: Sequence[Any], fingerprint: str) -> None:
    """Save the models of a front, the source first of them and not saved, ``front.json`` and the report."""
    from prunesweep.models import arch_of, save, weights_digest
    from prunesweep.models.io.files import write_text
    from prunesweep.models.io.provenance import versions
    from prunesweep.models.io.store import saved_digest
    from prunesweep.search.report.computed_page import write_computed_report
    from prunesweep.search.store.computed import WEIGHTS
    from prunesweep.search.store.records import sealed

    shared = {
        "method": "subspaces",
        "source": {"name": facts["source"], "weights": weights_digest(models[0])},
        "data": fingerprint,
        "calibration_images": facts["images"],
        "seed": facts["seed"],
        **({"protect": facts["protect"]} if "protect" in facts else {}),
        "versions": versions(),
    }
    for model, row in zip(models[1:], facts["points"][1:], strict=True):
        save(
            model,
            folder / row["model"],
            {**shared, **{k: v for k, v in row.items() if v is not None and k not in NOT_KEPT}},
        )
        row[WEIGHTS] = saved_digest(folder / row["model"])
    write_text(folder / "front.json", sealed(facts))
    write_computed_report(folder, facts, [arch_of(model) for model in models])


def _peak_memory() -> dict[str, float]:
    """Return the most memory that this process has had, in MiB, by device; Windows does not say that of the CPU."""
    import torch

    found = {}
    with suppress(ImportError):
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        found["cpu"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _memory_line(peak: Mapping[str, float]) -> str:
    own = ", ".join(f"{mib:,.0f} MiB ({device})" for device, mib in peak.items())
    return f"peak memory {own}\n" if own else ""


def _setting(table: LatencyTable | None) -> Setting:
    """Return the conditions of the table if there is one. Raises UserError where its device is not here."""
    import torch

    from prunesweep.models.latency.timing import Setting

    if table is None:
        return Setting(batch=BATCH, device="cuda" if torch.cuda.is_available() else "cpu")
    table.setting.require_device()
    return table.setting


def _timed(models: Sequence[Any], setting: Setting, progress: Callable[[str, int, int], None]) -> list[Any]:
    """Measure the models' latency side by side."""
    from prunesweep.models.latency.timing import device_name, measure_all

    timings = measure_all(models, setting, progress=lambda done, total: progress("measuring latency", done, total))
    shared = {**asdict(setting), "device_name": device_name(setting.device)}
    return [{**shared, **asdict(timing)} for timing in timings]


def _row(
    budget: float,
    model: Any,
    source: Arch,
    found: dict[str, float],
    timing: dict[str, Any] | None,
    table: LatencyTable | None,
) -> dict[str, Any]:
    """Return the row of a model of the front: costs, and what it gave on the validation split, which chose nothing."""
    from prunesweep.models import arch_of, cost
    from prunesweep.training import EvalMetrics

    arch = arch_of(model)
    spent = cost(arch)
    return {
        "budget": budget,
        "macs": spent.macs,
        "params": spent.params,
        "macs_share": spent.macs / cost(source).macs,
        "latency_ms": None if table is None else table.predict(arch),  # per batch, predicted
        "latency": timing,  # measured
        **EvalMetrics.of(found)._asdict(),
        "model": None,
    }


def _columns(source: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Return the headings of a front's table and what stands below them; ``source`` is the source's row."""

    def number(name: str, digits: int, unit: float = 1.0) -> Callable[[dict[str, Any]], str]:
        return lambda row: "-" if row.get(name) is None else f"{row[name] / unit:.{digits}f}"

    columns = [
        ("MACs M", number("macs", 2, 1e6)),
        ("share", number("macs_share", 3)),
        ("params M", number("params", 3, 1e6)),
    ]
    if source.get("latency_ms") is not None:
        columns.append(("ms by table", number("latency_ms", 3)))
    if source.get("latency") is not None:
        columns.append(("ms here", lambda row: f"{row['latency']['median_ms']:.3f}"))
    if source.get("cosine") is not None:
        columns += [("cosine", number("cosine", 4)), ("relative error", number("relative_error", 4))]
    else:
        columns.append(("top-1 %", number("top1", 2)) if source.get("ppl") is None else ("ppl", number("ppl", 2)))
        columns += [("KL", number("kl", 4)), ("agree %", number("agreement", 2))]
    return columns


def print_computed(path: Path, *, as_json: bool = False, as_csv: bool = False) -> None:
    """Print the front in a folder of computed models again.

    Args:
        path: the folder, of which ``ComputedFront.is_one`` holds.
        as_json, as_csv: a form for scripts, of the models alone, with the paths of their folders.

    Raises:
        NothingLeft: all of its models are gone.
    """
    from prunesweep.search.store.computed import ComputedFront

    from .console import PlainConsole
    from .nothing_left import NothingLeft
    from .spreadsheet import write_csv

    front = ComputedFront(path)
    gone = [folder for folder in front.folders if not folder.is_dir()]
    if gone and len(gone) == len(front.folders):
        raise NothingLeft(f"{path}: none of its {len(gone)} models is left: run 'prunesweep instant' again")
    for folder in gone:
        warnings.warn(f"{folder} is gone: 'prunesweep instant' makes it again", stacklevel=2)
    points = [{**point, "model": str(folder)} for point, folder in zip(front.points, front.folders, strict=True)]
    if as_json:
        print(json.dumps(points))
    elif as_csv:
        columns = [name for name in front.facts["points"][0] if name not in ("spent", "latency")]
        rows = ({**p, "measured_ms": p["latency"]["median_ms"] if p.get("latency") else None} for p in points)
        write_csv(sys.stdout, [*columns, "measured_ms"], rows)
    else:
        show_front(PlainConsole(), front.facts, path)


def show_front(console: Console, facts: dict[str, Any], out: Path, missed: Sequence[float] = ()) -> None:
    """Print the table of a front, why a budget is not met, and how a model is loaded.

    Args:
        console: where to print.
        facts: contents of ``front.json``.
        out: the front's folder.
        missed: budgets that no model meets.
    """
    from rich import box
    from rich.table import Table

    from .spent import spent_lines

    rows, table = facts["points"], Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    columns = _columns(rows[0])
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    table.add_column("model", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row) for _, text in columns), "source" if row["model"] is None else row["model"])
    console.print(table)
    for row in rows[1:]:
        for line in spent_lines(row.get("spent", {})):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    if timed := rows[0].get("latency"):
        console.print(
            f"latency measured: ms per batch of {timed['batch']}, {timed['dtype']}, on {timed['device_name']}",
            highlight=False,
        )
    for budget in missed:
        console.print(f"budget {budget:g}: the smallest widths cost more; nothing was computed", highlight=False)
    first = rows[-1]["model"] or "MODEL"
    kind = "images" if rows[0].get("ppl") is None else "words"
    console.print(
        f"measured on {rows[0]['images']:,} validation {kind}; models and report.html in {out}\n"
        f"{_memory_line(facts.get('peak_memory_mib', {}))}"
        f"load one: import prunesweep, timm; timm.create_model('local-dir:{out / first}', pretrained=True)",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
