"""Order of an MLP's hidden units by Optimal Brain Surgeon: what the output loses when the others make up for a unit.

With H the covariance of the hidden units and W the layer that reads them, taking unit j away and refitting all others
costs |w_j|^2 / [H^-1]_jj, after which W and H^-1 have exact downdates (Hassibi and Stork 1993; OSSCAR, arXiv
2403.12983, and ZipLM, arXiv 2302.04089, for structures).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from prunesweep.models import arch_of, block_views
from prunesweep.models.families import family_of

from .batches import Batches
from .calibration import images_of
from .normal_equations import Moments
from .source import open_source, to_model
from .streams import steps

__all__ = ["moments", "rank_units", "unit_moments", "unit_order", "units_by"]

SHRINKAGE = 1e-3  # of H, in units of its mean diagonal
STEPS = 32  # a step takes this share of the units that are left, at least one


def unit_order(covariance: torch.Tensor, writer: torch.Tensor) -> torch.Tensor:
    """Order units from the most important to the first to go.

    Args:
        covariance: H (M, M), of the units behind their activation.
        writer: W (D, M), float64.

    Returns:
        (M,), numbers of units; any first m of them are what an MLP of m units keeps.
    """
    M = len(covariance)
    eye = torch.eye(M, dtype=torch.float64, device=covariance.device)
    inverse = torch.linalg.inv(covariance.double() + SHRINKAGE * covariance.diagonal().mean().clamp_min(1e-30) * eye)
    weight, units, gone = writer.double().clone(), torch.arange(M, device=covariance.device), list[torch.Tensor]()
    alive = torch.ones(M, dtype=torch.bool, device=covariance.device)
    left = M
    while left > 1:
        losses = weight.square().sum(0) / inverse.diagonal()
        worst = losses.masked_fill(~alive, torch.inf).argsort(stable=True)[: max(1, left // STEPS)]
        step = torch.linalg.solve(inverse[worst][:, worst], inverse[worst])
        weight -= weight[:, worst] @ step
        inverse -= inverse[:, worst] @ step
        inverse.diagonal()[worst] = 1.0  # rows and columns of what is gone are zero now
        gone.append(units[worst])
        alive[worst] = False
        left -= len(worst)
        if left <= len(alive) // 2:  # carry on with what is left
            weight, inverse, units = weight[:, alive], inverse[alive][:, alive], units[alive]
            alive = alive[alive]
    return torch.cat([units[alive], *(own.flip(0) for own in reversed(gone))])


def moments(batches: Iterable[torch.Tensor], *, centred: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute covariance (F, F) and mean (F,) of rows (..., F); products in their own type, sums in float64.

    Not ``centred``, for a layer without a bias, the mean counts as zero.
    """
    sums = _sums(batches)
    return (sums.covariance, sums.mean) if centred else (sums.products / sums.rows, torch.zeros_like(sums.mean))


def _sums(batches: Iterable[torch.Tensor]) -> Moments:
    sums: Moments | None = None
    for batch in batches:
        sums = sums or Moments(batch.shape[-1], batch.device)
        sums.add(batch)
    if sums is None:
        raise ValueError("no rows")
    return sums


def rank_units(model: nn.Module, batches: Iterable[Any]) -> dict[int, torch.Tensor]:
    """Order the units of every MLP of a source.

    Args:
        model: the source, for which ``can_recover`` has no reason.
        batches: calibration images or texts in any form that ``images_of`` takes.

    Returns:
        The order of ``unit_order`` by block.
    """
    return units_by(model, unit_moments(model, batches))


def units_by(model: nn.Module, sums: Iterable[tuple[int, Moments]]) -> dict[int, torch.Tensor]:
    """Order the units of MLPs by their moments.

    Args:
        model: the source.
        sums: as ``unit_moments`` gives them, maybe added up over workers; the blocks' one after the other.

    Returns:
        The order of ``unit_order`` by block.
    """
    views, found = block_views(model, arch_of(model)), dict[int, torch.Tensor]()
    with torch.no_grad():
        for block, own in sums:
            writer = written_by(views[block].mlp)
            found[block] = unit_order(own.covariance.to(writer.device), writer)
    return found


def unit_moments(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[int, Moments]]:
    """Yield the moments of every MLP's hidden units with its block's number: sums that add up over workers.

    Args:
        model: the source, for which ``can_recover`` has no reason; in evaluation mode until all are taken.
        batches: calibration images or texts in any form that ``images_of`` takes.
    """
    arch = open_source(model)
    family, mode = family_of(arch), model.training
    model.eval()
    try:
        with torch.no_grad():
            streams = Batches(family.stem(model, to_model(model, batch)) for batch in images_of(batches, arch))
        for step in steps(model, arch):
            if step.view is not None and step.mlp is not None:
                mlp, rows = step.mlp, arch.stages[step.stage].grid[0]
                with torch.no_grad():
                    sums = _sums(mlp.hidden(mlp.norm(x), rows) for x in streams)
                yield step.view.index, sums
            with torch.no_grad():
                streams = Batches(map(step.run, streams))
    finally:
        model.train(mode)


def written_by(half: Any) -> torch.Tensor:
    """Return the matrix (D, F) of a half's last layer with its LayerScale folded in, in float64."""
    factors = getattr(half.scale, "gamma", None)
    weight: torch.Tensor = half.out.weight.double()
    return weight if factors is None else factors.double()[:, None] * weight
