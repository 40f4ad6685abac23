"""Write a run as one self-contained, interactive page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from prunesweep.models.io.files import write_text
from prunesweep.search.store.run import Run

from .page_data import page_data

__all__ = ["as_script", "render", "render_data", "render_run", "write_report"]

FOLDER = Path(__file__).parent
# of the page of a run, in this order
VIEWS = tuple(f"views/{name}.js" for name in ("parts", "figures", "front", "models", "search", "chosen", "main"))
PLOTLY = "vendor/plotly-cartesian.min.js"
# what a page may load: nothing; the live one asks its own server for data
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src {connect}; base-uri 'none'; form-action 'none'"
)


def write_report(run: Run) -> Path:
    """Write ``report.html``: what a search found, at what cost, and what it is doing.

    Returns:
        The page's file.
    """
    path = run / "report.html"
    write_text(path, render_run(run))
    return path


def render_run(run: Run, *, live: bool = False) -> str:
    """Return the page of a run.

    Args:
        run: the run.
        live: the page asks the server that it came from for ``data.json``, again and again.
    """
    return render_data(page_data(run), live=live)


def render_data(data: Mapping[str, Any], *, live: bool = False) -> str:
    """Return the page of what ``page_data`` gave.

    Args:
        data: that.
        live: as for ``render_run``.
    """
    return render("report.html", f"prunesweep: {data['name']}", data, scripts=VIEWS, live=live)


def render(
    template: str, title: str, data: Mapping[str, Any], *, scripts: Sequence[str] = (), live: bool = False
) -> str:
    """Return a page that needs nothing but itself, in a browser without network.

    Args:
        template: a file of this folder; what pages share is put into it.
        title: of the page.
        data: JSON-ready, what its script reads.
        scripts: further files of this folder that make up the page's script.
        live: the page may ask its own server for data.
    """
    parts = {
        name: (FOLDER / name).read_text(encoding="utf-8") for name in (template, "shared.css", "shared.js", PLOTLY)
    }
    own = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in scripts)
    return Template(parts[template]).substitute(
        title=html.escape(title),
        policy=POLICY.format(connect="'self'" if live else "'none'"),
        live="live" if live else "",
        style=parts["shared.css"],
        shared=parts["shared.js"],
        script=own,
        plotly=parts[PLOTLY],
        data=as_script(data),
    )


def as_script(data: Mapping[str, Any]) -> str:
    """Return JSON that no text in it can end or open an element of the page with; what is no number becomes null."""
    return json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(name): _finite(value) for name, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data
