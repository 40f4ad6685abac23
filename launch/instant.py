"""``prunesweep instant``: a front of smaller models, computed without labels and without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["instant"]

BATCH = 64  # images per calibration batch


def instant(
    source: Annotated[str, typer.Argument(help="folder of a saved model, or a timm name", show_default=False)],
    data: Annotated[
        str, typer.Option(help="digits, imagefolder:PATH, images:PATH, wds:PATH or hfds:NAME", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="folder of the front, which must not exist yet", show_default=False)],
    budgets: Annotated[
        str, typer.Option(help="shares of the source's cost, separated by commas")
    ] = "0.9,0.7,0.5,0.3,0.15",
    objective: Annotated[str, typer.Option(help="what the budgets are counted in: macs or params")] = "macs",
    align: Annotated[int, typer.Option(min=1, help="widths are multiples of it; 8 suits GPUs")] = 1,
    images: Annotated[
        int, typer.Option(min=2, help="calibration images, from the training split, without labels")
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, help="of the choice of calibration images")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Compute a front of smaller models from a few hundred unlabelled images; nothing is trained."""
    from rich.console import Console

    from prunesweep.models import UserError, arch_of, cost, save, weights_digest
    from prunesweep.models.io.files import publish_folder, write_text
    from prunesweep.models.io.provenance import versions
    from prunesweep.models.precision import as_stored
    from prunesweep.pruners.subspaces import instant as compute
    from prunesweep.search.report.display import Display
    from prunesweep.training import check_fits, open_data
    from prunesweep.training.jobs.one_shot import evaluate_shown, open_source

    shares = _shares(budgets)
    if out.exists():
        raise UserError(f"--out {out}: is there already; give a new folder")
    model = open_source(source)
    dataset = open_data(data, model.pretrained_cfg)
    check_fits(arch_of(model), dataset)
    whole = cost(arch_of(model))
    batches = dataset.calibration(images, min(BATCH, max(1, images // 4)), seed)
    console = Console(markup=False)
    with Display(console).progress() as report:

        def progress(what: str, done: int, total: int) -> None:
            report(what, done / total, f"{done} of {total}")

        points = compute(model, batches, shares, objective=objective, align=align, progress=progress)
        for point in points:
            as_stored(point.model)
        found = evaluate_shown([model, *(point.model for point in points)], dataset, report, source=model)
    held_out: Any = dataset.split("val", augment=None)
    seen = len(held_out)
    rows = [_row(1.0, model, found[0], whole, seen)]
    rows += [_row(p.budget, p.model, own, whole, seen) for p, own in zip(points, found[1:], strict=True)]
    with publish_folder(out.absolute()) as folder:
        for point, row in zip(points, rows[1:], strict=True):
            row["model"] = f"{point.budget:g}"
            row["spent"] = _spent(point.budget, row[objective], getattr(whole, objective), objective, align)
            provenance = {
                "method": "subspaces",
                "source": {"name": source, "weights": weights_digest(model)},
                "data": dataset.info.fingerprint,
                "images": images,
                "seed": seed,
                "versions": versions(),
                **{k: row[k] for k in ("budget", "spent", "kl", "agreement", "top1") if row[k] is not None},
            }
            save(point.model, folder / row["model"], provenance)
        facts = {"source": source, "data": data, "objective": objective, "images": images, "seed": seed}
        write_text(folder / "front.json", json.dumps({**facts, "points": rows}, indent=1))
    if as_json:
        print(json.dumps({**facts, "points": rows}))
        return
    _show(console, rows, out, [share for share in shares if share not in {p.budget for p in points}])


def _shares(text: str) -> list[float]:
    from prunesweep.models import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--budgets {text}: must be numbers separated by commas, for example 0.5,0.3") from None


def _spent(share: float, cost: int, whole: int, objective: str, align: int) -> dict[str, Any]:
    """Say what a budget was and what is spent of it; ``share`` and costs are of the objective."""
    from prunesweep.pruners import meets, spent

    missed = "" if meets(cost, share * whole) else f"the next widths, in steps of {align}, cost more"
    return spent(objective, share * whole, cost, whole, missed)


def _row(budget: float, model: Any, found: dict[str, float], whole: Any, images: int) -> dict[str, Any]:
    """Return the row of a model of the front: cost, and what it gave on the validation split, which chose nothing."""
    from prunesweep.models import arch_of, cost

    spent = cost(arch_of(model))
    return {
        "budget": budget,
        "macs": spent.macs,
        "params": spent.params,
        "macs_share": spent.macs / whole.macs,
        "top1": found.get("top1"),
        "kl": found["kl"],
        "agreement": found["agreement"],
        "images": images,
        "model": None,
    }


def _show(console: Any, rows: Sequence[dict[str, Any]], out: Path, missed: Sequence[float]) -> None:
    from rich import box
    from rich.table import Table

    from .spent import spent_lines

    table = Table(box=box.SIMPLE)
    for name in ("MACs M", "share", "params M", "top-1 %", "KL", "agreement %", "model"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['macs'] / 1e6:.2f}",
            f"{row['macs_share']:.3f}",
            f"{row['params'] / 1e6:.3f}",
            "-" if row["top1"] is None else f"{row['top1']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['agreement']:.2f}",
            "source" if row["model"] is None else row["model"],
        )
    console.print(table)
    for row in rows[1:]:
        for line in spent_lines(row["spent"]):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    for budget in missed:
        console.print(f"budget {budget:g}: the smallest widths cost more; nothing was computed", highlight=False)
    first = rows[-1]["model"] or "MODEL"
    console.print(
        f"top-1, KL and agreement with the source on {rows[0]['images']:,} validation images; models in {out}\n"
        f"load one: import prunesweep, timm; timm.create_model('local-dir:{out / first}', pretrained=True)",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
