"""``prunesweep models``: which of timm's pretrained names are represented, by family, and why others are not."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from prunesweep.models.represented import Verdict

__all__ = ["models"]


def models(
    everything: Annotated[bool, typer.Option("--all", help="every name, with its family or the reason")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="every name, in a stable form for scripts")] = False,
) -> None:
    """Show which of timm's pretrained models can be compressed, by family, and why others cannot."""
    from dataclasses import asdict

    import timm

    from prunesweep.models.represented import verdicts

    from .console import PlainConsole

    found = verdicts()
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
        return
    if everything:
        for one in found:
            print(f"{one.name}: {one.family or f'refused, {one.reason}'}")
    able = [one for one in found if one.family]
    if not everything:
        console = PlainConsole()
        console.print(_families(able))
        console.print(_reasons(found))
    print(f"{len(able):,} of the {len(found):,} names that timm {timm.__version__} has weights for")


def _families(able: list[Verdict]) -> Table:
    from rich.table import Table

    table = Table(title="represented")
    for column in ("family", "names", "for example"):
        table.add_column(column, justify="right" if column == "names" else "left", no_wrap=True)
    by_family: dict[str, list[str]] = defaultdict(list)
    for one in able:
        by_family[str(one.family)].append(one.name)
    for family, names in sorted(by_family.items(), key=lambda item: -len(item[1])):
        table.add_row(family, str(len(names)), names[len(names) // 2])
    return table


def _reasons(found: list[Verdict]) -> Table:
    """Build the table of reasons; classes that no family reads share a row."""
    from rich.table import Table

    table = Table(title="refused")
    for column in ("names", "why", "for example"):
        own = column != "why"  # a name that is wrapped cannot be copied
        table.add_column(column, justify="right" if column == "names" else "left", overflow="fold", no_wrap=own)
    strange = {f"is a {one.kind}" for one in found}
    reasons = Counter(one.reason for one in found if one.reason and one.reason not in strange)
    for reason, count in reasons.most_common():
        table.add_row(str(count), reason, next(one.name for one in found if one.reason == reason))
    others = Counter(one.kind for one in found if one.reason in strange)
    if others:
        listed = ", ".join(f"{kind} {count}" for kind, count in others.most_common())
        table.add_row(str(others.total()), f"no family for: {listed}", "")
    return table
