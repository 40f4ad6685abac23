"""Scores of subspaces: what every width of a source is worth, so that any budget's widths follow on one path.

A unit is a dimension of a subspace, the most important first, so a decision says how many stay and the projection what
(``projected_widths``). Scores are estimated squared changes of an image's logits: of ranks, reduced maps and hidden
units the one-block losses of ``block_losses``, of a residual stream what projecting it alone, all else whole and
refitted, changes. Between the levels that are measured a loss is taken to its lower convex hull, along which units of
one vector go in the order of their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from prunesweep.models import arch_of
from prunesweep.models.precision import widened
from prunesweep.pruners.scores import Scores

from .block_losses import measure_losses
from .calibration import hold_out, images_of, shrinkage_for
from .compression import compress
from .refit import SHRINKAGE
from .sensitivity import output_error
from .source import SourceStatistics, to_model
from .streams import scouted
from .widths import BlockWidths, Widths

__all__ = ["score"]

HELD_OUT = 0.25  # of the images: losses are estimated on them, fits read the others
STREAM = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.1875, 0.125)  # residual widths that are tried, below the whole
BELOW = 2.0  # times the last slope, for units below the narrowest level


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Any], *, progress: Callable[[int, int], None] | None = None) -> Scores:
    """Score a model's residual streams, ranks, reduced maps and hidden units by what narrowing them costs.

    Args:
        model: the source, for which ``can_recover`` has no reason; it is not changed.
        batches: calibration images or texts in any form that ``images_of`` takes; labels are not read.
        progress: told of steps done and of all: one for every block, and one for every residual width that is tried.

    Returns:
        Vectors of kinds ``embed``, ``qk``, ``v``, ``sr`` and ``mlp``; of ranks, one entry for the channels of that
        number of all heads.

    Raises:
        UserError: as ``compress``.
    """
    arch = arch_of(model)
    fit, held_out = hold_out(images_of(batches, arch), HELD_OUT)
    mode, model = model.training, widened(model)
    model.eval()
    streams = [(s, width) for s, stage in enumerate(arch.stages) for width in _narrower(stage.width)]
    steps = arch.depth + len(streams)

    def report(done: int) -> None:
        if progress:
            progress(done, steps)

    try:
        statistics = SourceStatistics.collect(model, fit)
        shrinkage = shrinkage_for(arch, fit, SHRINKAGE)
        found = measure_losses(
            model,
            fit,
            held_out,
            statistics,
            shrinkage=shrinkage,
            progress=lambda done, due: report(arch.depth * done // due),
        )
        losses: dict[str, Mapping[int, float]] = {f"blocks.{i}.{kind}": own for (i, kind), own in found.losses.items()}
        wanted, shared = _logits(model, held_out), scouted(model, fit, statistics)
        for number, (s, width) in enumerate(streams, 1):
            embed = tuple(width if t == s else None for t in range(len(arch.stages)))
            small = compress(
                model,
                Widths(embed=embed, blocks=(BlockWidths(),) * arch.depth),
                shared,
                statistics=statistics,
                units=found.units,
                shrinkage=shrinkage,
            )
            own = losses.setdefault(f"stages.{s}.embed", {arch.stages[s].width: 0.0})
            assert isinstance(own, dict)
            own[width] = output_error(arch, wanted, _logits(small, held_out))
            report(arch.depth + number)
    finally:
        model.train(mode)
    vectors = {name: _units(own) for name, own in losses.items()}
    return Scores(
        vectors, {"method": "subspaces", "arch": arch.hash, "images": sum(map(len, fit)) + sum(map(len, held_out))}
    )


def _narrower(full: int) -> list[int]:
    return sorted({max(2, round(full * share)) for share in STREAM if round(full * share) < full}, reverse=True)


def _logits(model: nn.Module, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(to_model(model, images)) for images in batches])


def _units(losses: Mapping[int, float]) -> torch.Tensor:
    """Share the losses of some widths out among units (n,), from the most important to the first to go."""
    hull: list[tuple[int, float]] = []
    for width, loss in sorted(losses.items(), reverse=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (width, loss)):
            hull.pop()
        hull.append((width, loss))
    found = torch.zeros(hull[0][0], dtype=torch.float64)
    slope = 0.0
    for wide, narrow in pairwise(hull):
        slope = max(_slope(wide, narrow), 0.0)
        found[narrow[0] : wide[0]] = slope
    found[: hull[-1][0]] = BELOW * slope
    return found


def _slope(wide: tuple[int, float], narrow: tuple[int, float]) -> float:
    return (narrow[1] - wide[1]) / (wide[0] - narrow[0])
