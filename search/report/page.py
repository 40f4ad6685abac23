"""Write a run as one self-contained, interactive page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from prunesweep.models import Arch, UserError, cut_arch, read_arch
from prunesweep.models.io.files import write_text
from prunesweep.search.execution.promote import promoted
from prunesweep.search.report.display import front_notes
from prunesweep.search.store.front import values
from prunesweep.search.store.run import Result, Run

__all__ = ["picture", "render", "write_report"]


def write_report(run: Run) -> Path:
    """Write ``report.html``: accuracy against MACs of every candidate, and the blocks of the selected one.

    Candidates without a finite result have no place in it.
    """
    facts, points = run.metadata(), run.front()
    front = {(point["trial"], point["rung"]) for point in points}
    further = {entry["unit"]: entry for entry in promoted(run)}
    source = read_arch(run / "source")
    trials = [
        {
            "unit": r.id,
            "trial": r.trial,
            **r.figures._asdict(),
            "interval": r.figures.interval,
            "validation": _validation(run, r) if (r.trial, r.rung) in front else None,
            "latency_ms": r.latency_ms,
            "promoted": further.get(r.id),
            "zero_shot": r.zero_shot if math.isfinite(r.zero_shot) else None,
            "macs": r.macs,
            "params": r.params,
            "point": r.point,
            "given": None if r.given is None else [r.given, run.made_by(r.given)],
            "seconds": r.seconds,
            "arch_hash": r.arch_hash,
            "front": (r.trial, r.rung) in front,
            "rung": r.rung,
            "epochs": r.epochs,
            "arch": picture(_record(run, r, source), source),
        }
        for r in run.current()
        if r.has_model and all(map(math.isfinite, values(r, run.objectives)))
    ]
    data = {
        "name": run.path.name,
        "source": {**run.searched_source(), "arch": picture(source, source)},
        "notes": front_notes(points),
        "advice": run.advice(),
        "objectives": run.objectives,
        "trials": trials,
        "failed": len(run.failures()),
        "versions": facts["versions"],
    }
    page = render("report.html", f"prunesweep: {run.path.name}", data)
    path = run / "report.html"
    write_text(path, page)
    return path


def _validation(run: Run, result: Result) -> dict[str, Any] | None:
    found = run.validation(result)
    return None if found is None else {**found._asdict(), "interval": found.interval}


def render(template: str, title: str, data: Mapping[str, Any]) -> str:
    """Return a page that needs nothing but itself, in a browser without network.

    Args:
        template: a file of this folder; what pages share is put into it.
        title: of the page.
        data: JSON-ready, what its script reads.
    """
    folder = Path(__file__).parent
    parts = {name: (folder / name).read_text(encoding="utf-8") for name in (template, "shared.css", "shared.js")}
    return Template(parts[template]).substitute(
        title=title,
        style=parts["shared.css"],
        shared=parts["shared.js"],
        plotly=get_plotlyjs(),
        data=json.dumps(data).replace("</", "<\\/"),  # no text of ours can end the script element
    )


def _record(run: Run, result: Result, source: Arch) -> Arch:
    """The record of a candidate; made again from its decision, or the model it was given, where its file is damaged."""
    path = run.trial(result.id) / "arch.json"
    try:
        found = Arch.from_json(path.read_text(encoding="utf-8"))
        if found.hash != result.arch_hash:
            raise UserError(f"it is the record of {found.hash}, not of {result.arch_hash}")
    except (OSError, ValueError, RecursionError) as error:
        if result.given is not None:
            return read_arch(run / result.given)
        decision = run.read_cut(result.trial)
        if decision is None:
            raise UserError(f"{path} is damaged or missing, and so is the decision (cut.json): {error}") from error
        return cut_arch(source, decision)
    return found


def picture(arch: Arch, source: Arch) -> dict[str, Any]:
    """Return the kept channels of every block of the source, as numbers and shares; None for a dropped block.

    Args:
        arch: record of a compressed form.
        source: record of its source.
    """
    kept = {block.src: block for block in arch.blocks}
    blocks: list[dict[str, Any] | None] = []
    for whole in source.blocks:
        block = kept.get(whole.src)
        if block is None:
            blocks.append(None)
            continue
        own, full = ({"qk": b.heads * b.qk, "v": sum(b.v_widths), "mlp": b.mlp} for b in (block, whole))
        blocks.append(
            {
                "mixer": block.mixer,
                "tokens": block.tokens,
                "heads": block.heads,
                "qk": block.qk,
                "v": block.v,
                "mlp": block.mlp,
                "share": {kind: own[kind] / full[kind] if full[kind] else 0 for kind in own},
            }
        )
    return {"width": arch.stages[0].width, "depth": arch.depth, "blocks": blocks}
