"""``prunesweep verify``: check everything that a run, a saved model or a computed front consists of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .place import brought, place, shown

__all__ = ["verify"]


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            parser=place,
            help="folder of a run, or its URL, of a saved model or of `prunesweep instant`",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Check all files: that each holds what was written, that models load, that records and the journal agree.

    Nothing is changed. Exit code 1 where something is damaged.
    """
    import json

    from prunesweep.search.verify import verify as problems_of

    from .console import PlainConsole

    path = brought(path)
    problems = problems_of(path)
    if as_json:
        print(json.dumps({"path": str(path), "problems": [problem._asdict() for problem in problems]}))
    else:
        lines = [f"{' '.join(p.found.split())}: {' '.join(p.remedy.split())}" for p in problems]
        text = "\n".join(lines) or f"{shown(path)}: all is sound"
        PlainConsole().print(text, highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
