"""What narrowing costs: the order of units, gradients in place of forward passes, one-block losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from prunesweep.models import arch_of, block_views
from prunesweep.models.families import family_of
from prunesweep.pruners.subspaces import BlockWidths, SourceStatistics, Widths, compress, instant, rank_units
from prunesweep.pruners.subspaces.block_losses import levels, measure_losses
from prunesweep.pruners.subspaces.refit import tail
from prunesweep.pruners.subspaces.sensitivity import Sensitivity, logit_error
from prunesweep.pruners.subspaces.units import moments, unit_order, written_by
from tests.pruners.subspaces.test_compress import images, made, vit
from tests.pruners.subspaces.test_families import batches_of, by_family, source_of


def test_moments_are_those_of_all_rows() -> None:
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    covariance, mean = moments(rows.view(6, 2, 5, 5))
    torch.testing.assert_close(covariance, rows.T.cov(correction=0))
    torch.testing.assert_close(mean, rows.mean(0))


def test_units_go_in_the_order_of_least_error_after_a_refit() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = (
        torch.randn(300, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 9, generator=generator).double()
    )
    rows = rows + 0.1 * torch.randn(300, 9, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(0)
    writer = torch.randn(4, 9, generator=generator, dtype=torch.float64)

    def error(kept: list[int]) -> float:
        fit = torch.linalg.lstsq(rows[:, kept], rows @ writer.T).solution
        return (rows[:, kept] @ fit - rows @ writer.T).square().sum().item()

    kept, gone = list(range(9)), []
    while len(kept) > 1:
        gone.append(min(kept, key=lambda unit: error([k for k in kept if k != unit])))
        kept.remove(gone[-1])
    order = unit_order(rows.T @ rows / 300, writer)
    assert order.tolist()[2:] == [*reversed(gone)][1:]
    assert sorted(order.tolist()) == list(range(9))


def test_a_unit_that_others_make_up_for_goes_first() -> None:
    rows = torch.randn(500, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows[:, 7] = rows[:, 3] - 2 * rows[:, 11]
    writer = torch.ones(5, 40, dtype=torch.float64)
    writer[:, 7] = 9  # the most energy of all
    assert unit_order(rows.T.cov(), writer)[-1] in (3, 7, 11)


@by_family
def test_gradients_tell_what_a_small_change_does(family: str) -> None:
    source = source_of(family, 1).requires_grad_(False)
    arch, views = arch_of(source), block_views(source)
    family_, batch = family_of(arch), batches_of(source, 1, 8)[0]
    view = views[0]
    x = family_.run_block(arch, arch.stages[0], view.module, family_.stem(source, batch))
    change = 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    half = "attention" if view.mlp is None else "mlp"
    true = logit_error(tail(source, arch, views, 1, x), tail(source, arch, views, 1, x + change))
    draws = [Sensitivity(source, [batch], seed).loss(0, half, [change]) for seed in range(40)]
    assert sum(draws) / len(draws) == pytest.approx(true, rel=0.25)


def one_narrowed(source: nn.Module, block: int, **widths: int) -> Widths:
    return Widths(
        blocks=tuple(BlockWidths(**widths) if i == block else BlockWidths() for i in range(arch_of(source).depth))
    )


@by_family
def test_losses_rank_like_models_that_are_narrowed_and_run(family: str) -> None:
    source = source_of(family, 2).eval()
    batches = batches_of(source, 12)
    fit, held_out = batches[:8], batches[8:]
    statistics = SourceStatistics.collect(source, fit)
    found = measure_losses(source, fit, held_out, statistics)
    with torch.no_grad():
        wanted = torch.cat([source(batch) for batch in held_out])
        estimated, true = [], []
        for (block, space), losses in found.losses.items():
            assert list(losses) == levels(max(losses), 1)
            assert losses[max(losses)] == 0
            for width in list(losses)[1:]:
                small = compress(
                    source, one_narrowed(source, block, **{space: width}), fit, statistics=statistics, units=found.units
                )
                true.append(logit_error(wanted, torch.cat([small(batch) for batch in held_out])))
                estimated.append(losses[width])
        assert spearmanr(estimated, true)[0] > 0.8


@by_family
def test_an_order_of_units_is_kept_to(family: str) -> None:
    source = source_of(family, 0)
    batches, block = batches_of(source, 4), next(i for i, own in enumerate(arch_of(source).blocks) if own.mlp > 3)
    orders = rank_units(source, batches)
    assert orders.keys() == {i for i, own in enumerate(arch_of(source).blocks) if own.mlp}
    widths = one_narrowed(source, block, mlp=2)
    chosen = {block: torch.arange(arch_of(source).blocks[block].mlp)}
    small = compress(source, widths, batches, units=chosen, refit=False)
    before, after = (block_views(model)[block].mlp for model in (source, small))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after.out.weight.double(), written_by(before)[:, :2])


def test_the_model_of_a_point_is_fitted_to_all_images() -> None:
    source = source_of("vit", 4)
    batches = batches_of(source, 8)
    (point,) = instant(source, batches, (0.7,))
    statistics = SourceStatistics.collect(source, batches[:6])
    units = measure_losses(source, batches[:6], batches[6:], statistics).units
    again = compress(source, point.widths, batches, statistics=statistics, units=units)
    with torch.no_grad():
        torch.testing.assert_close(point.model(batches[0]), again(batches[0]))
    assert point.images == sum(map(len, batches[6:]))


def test_values_that_do_not_use_their_width_in_float32() -> None:
    """Rounding leaves the covariance of such values indefinite; narrowing them to what they use costs nothing."""
    source: Any = made(vit())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in source.blocks:
            for h in range(2):
                rows = slice(24 + h * 6, 24 + h * 6 + 6)
                low = torch.randn(6, 1, generator=generator) @ torch.randn(1, 24, generator=generator)
                block.attn.qkv.weight[rows] = low
    source = source.float()
    batches = [batch.float() for batch in images(80, 8)]
    found = measure_losses(source, batches[:6], batches[6:], SourceStatistics.collect(source, batches[:6]))
    for i in range(3):
        own = found.losses[i, "v"]
        assert all(0 <= loss < 1e-6 * found.losses[i, "mlp"][2] for loss in own.values())
