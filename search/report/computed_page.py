"""Write a front of computed models as one self-contained, interactive page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunesweep.models import Arch
from prunesweep.models.io.files import write_text

from .page import render
from .savings import picture

__all__ = ["write_computed_report"]


def write_computed_report(folder: Path, facts: Mapping[str, Any], archs: Sequence[Arch]) -> Path:
    """Write ``report.html``: quality against cost of every model, and the blocks of the selected one.

    Args:
        folder: of the front.
        facts: contents of its ``front.json``.
        archs: records of the source and of the models, in the order of ``facts["points"]``.

    Returns:
        The page's file.
    """
    points = [
        {
            **point,
            "unit": point["model"],
            "measured_ms": point["latency"] and point["latency"]["median_ms"],
            "arch": picture(arch, archs[0]),
        }
        for point, arch in zip(facts["points"], archs, strict=True)
    ]
    data = {**facts, "name": facts["source"], "source": points[0], "points": points[1:]}
    path = folder / "report.html"
    write_text(path, render("computed.html", f"prunesweep: computed from {facts['source']}", data))
    return path
