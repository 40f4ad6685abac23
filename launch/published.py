"""``prunesweep published``: compare the figures that papers print with the exact costs of their models."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from prunesweep.models.published.comparison import Comparison, Published

__all__ = ["published"]

LABELS = {
    "params_m": "params M",
    "macs_g": "MACs G",
    "params_ratio": "params x",
    "macs_ratio": "MACs x",
    "macs_share": "MACs %",
}
LEGEND = """\
difference: exact over printed, less 1; * beyond the rounding of what is printed. by paper: the same with the paper's
own formula. x: dense model over this one. %: share of the dense model. top-1: alone / with a convolutional teacher.
"""


def published(
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts, with everything")] = False,
) -> None:
    """Show the published architectures: exact costs beside the papers' figures.

    timm.create_model(NAME) builds every one whose costs are given.
    """
    from rich.measure import Measurement
    from rich.table import Table

    from prunesweep.models.published.comparison import PUBLISHED

    from .console import PlainConsole

    rows = list(PUBLISHED.values())
    if as_json:
        print(json.dumps([_entry(row) for row in rows]))
        return
    marks: dict[str, int] = {}
    table, console = _table(rows, marks), PlainConsole()
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if console.width < width:  # rich would cut off numbers; the terminal wraps lines instead
        console = PlainConsole(width=width)
    footnotes = Table.grid(padding=(0, 1))
    for note, mark in marks.items():
        footnotes.add_row(str(mark), note)
    for part in (table, LEGEND, footnotes):
        console.print(part, highlight=False)


def _entry(row: Published) -> dict[str, Any]:
    """Return one row in the form for scripts.

    ``printed`` keeps the paper's digits; ``exact`` and ``by_paper`` are in the same unit.
    """
    from prunesweep.models import cost
    from prunesweep.models.published.comparison import compare

    spent = None if row.arch is None else cost(row.arch)
    figures = [
        {
            "what": c.what,
            "printed": c.printed,
            "exact": c.exact,
            "difference": c.difference(c.exact),
            "by_paper": c.by_paper,
            "difference_by_paper": c.difference(c.by_paper),
        }
        for c in compare(row)
    ]
    facts = ("name", "title", "method", "paper", "where", "dense", "top1", "top1_distilled", "notes")
    return {
        **{name: getattr(row, name) for name in facts},
        "counting": None if row.counting is None else row.counting.note,
        "speeds": [dataclasses.asdict(speed) for speed in row.speeds],
        "arch_hash": None if row.arch is None else row.arch.hash,
        "macs": None if spent is None else spent.macs,
        "params": None if spent is None else spent.params,
        "figures": figures,
    }


def _table(rows: list[Published], marks: dict[str, int]) -> Table:
    """Return one line per printed figure; add to ``marks`` the number of each new note, in order."""
    from rich import box
    from rich.table import Table

    from prunesweep.models.published.comparison import compare

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Published architectures", title_justify="left")
    table.add_column("name", no_wrap=True)
    for heading in ("params", "MACs", "top-1 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("figure", no_wrap=True)
    for heading in ("printed", "difference", "by paper"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("notes", no_wrap=True)
    for _, group in groupby(rows, lambda row: row.method):
        for row in group:
            for number, comparison in enumerate(compare(row)):
                about = ("", "", "", "") if number else _about(row)
                table.add_row(*about, *_differences(comparison), "" if number else _marks(row, marks))
        table.add_section()
    return table


def _about(row: Published) -> tuple[str, str, str, str]:
    from prunesweep.models import cost

    top1 = " / ".join("-" if value is None else f"{value:g}" for value in (row.top1, row.top1_distilled))
    if row.arch is None:
        return row.name, "-", "-", top1
    spent = cost(row.arch)
    return row.name, f"{spent.params:,}", f"{spent.macs:,}", top1


def _differences(comparison: Comparison) -> tuple[str, str, str, str]:
    def show(value: float | None) -> str:
        difference = comparison.difference(value)
        if difference is None:
            return ""
        return f"{'' if comparison.agrees(value) else '* '}{100 * difference:+.2f} %"

    return LABELS[comparison.what], comparison.printed, show(comparison.exact), show(comparison.by_paper)


def _marks(row: Published, marks: dict[str, int]) -> str:
    notes = ((row.counting.note,) if row.counting else ()) + row.notes
    return " ".join(str(marks.setdefault(note, len(marks) + 1)) for note in notes)
