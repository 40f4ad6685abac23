"""How much of every space of a source each of its dimensions is worth, for curves of what a model threw away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prunesweep.models import Arch, UserError
from prunesweep.pruners import Scores
from prunesweep.pruners.scores import kind_of, unit_counts
from prunesweep.search.store.run import Run

__all__ = ["spectra"]

METHOD = "subspaces"  # the scores whose units are dimensions, the most important first
POINTS = 40  # of a curve, at most


def spectra(run: Run, files: Mapping[str, str], source: Arch) -> list[dict[str, Any]]:
    """Return, of every space that was scored, the share of the loss that is left out at every width.

    Args:
        run: the run.
        files: names of its score files, by method.
        source: the source's record.

    Returns:
        ``name`` of the space (``blocks.3.qk``, ``stages.0.embed``), its ``size``, ``widths`` ascending, and ``lost``:
        the loss of the dimensions beyond each of these widths, as a share of that of all. Nothing where models are not
        computed, or the scores are damaged or gone.
    """
    if METHOD not in files:
        return []
    try:
        vectors = Scores.load(run / "scores" / files[METHOD]).vectors
    except (UserError, OSError):
        return []
    sizes, found = unit_counts(source), list[dict[str, Any]]()
    for name, vector in sorted(vectors.items(), key=lambda item: _order(item[0])):
        values = np.sort(np.asarray(vector, dtype=np.float64))[::-1]
        if name not in sizes or not np.isfinite(values).all() or values.sum() <= 0:
            continue
        widths = np.unique(np.round(np.linspace(0, len(values), min(len(values) + 1, POINTS))).astype(int))
        lost = 1 - np.concatenate(([0.0], np.cumsum(values)))[widths] / values.sum()
        found.append(
            {
                "name": name,
                "size": len(values),
                "widths": widths.tolist(),
                "lost": [float(f"{max(share, 0.0):.4g}") for share in lost],
            }
        )
    return found


def _order(name: str) -> tuple[str, int, str]:
    place, number, *_ = name.split(".")
    return place, int(number) if number.isdigit() else -1, kind_of(name)
