"""``prunesweep verify``: check everything that a run, a saved model or a computed front consists of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["verify"]


def verify(
    path: Annotated[
        Path,
        typer.Argument(help="folder of a run, of a saved model or of `prunesweep instant`", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Check all files: that each holds what was written, that models load, that records and the journal agree.

    Nothing is changed. Exit code 1 where something is damaged.
    """
    import json

    from prunesweep.search.verify import verify as problems_of

    from .console import PlainConsole

    problems = problems_of(path)
    if as_json:
        print(json.dumps({"path": str(path), "problems": [problem._asdict() for problem in problems]}))
    else:
        lines = [f"{' '.join(p.found.split())}: {' '.join(p.remedy.split())}" for p in problems]
        PlainConsole().print("\n".join(lines) or f"{path}: all is sound", highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
