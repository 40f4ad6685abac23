"""Places on the command line: folders of this machine, or URLs of an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["RunArgument", "brought", "place", "shown"]


def place(text: str) -> str | Path:
    """Return a URL as it is, of which a ``Path`` would be another one, and a folder as a ``Path``."""
    from prunesweep.models.io.objects import is_url, local_path

    return text if is_url(text) else local_path(text)


def brought(given: str | Path, *, whole: bool = True) -> Path:
    """Return a folder of this machine; what a URL has is brought there.

    Args:
        given: a folder, or a URL.
        whole: as for ``view``.

    Raises:
        UserError: the store cannot be used, or has nothing there.
    """
    if isinstance(given, Path):
        return given
    from prunesweep.search.store.stored import view

    return view(given, whole=whole)


def shown(path: Path) -> str:
    """Return a path as a user would give it: below a URL if it was brought from there."""
    from prunesweep.search.store.mirror import shown_place

    return shown_place(path)


RunArgument = Annotated[
    Path,  # or a URL: ``brought`` makes a folder of it
    typer.Argument(parser=place, help="the run's folder, for example runs/digits, or its URL", show_default=False),
]
