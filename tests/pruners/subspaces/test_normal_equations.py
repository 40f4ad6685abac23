from __future__ import annotations

import torch

from prunesweep.pruners.subspaces.normal_equations import Moments, NormalEquations


def rows(count: int, features: int, seed: int = 0) -> torch.Tensor:
    """Rows in float32 whose means are large against what varies."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2, 0, features)
    return 100 * torch.randn(features, generator=generator) + spread * torch.randn(count, features, generator=generator)


def test_float32_rows_lose_nothing_beside_a_large_mean() -> None:
    """More features than one panel of the products has, in batches of unequal size."""
    features = rows(900, 300)
    sums = Moments(300)
    for batch in features.split([7, 393, 500]):
        sums.add(batch)
    wanted = features.double().T.cov(correction=0)
    assert sums.covariance.dtype == torch.float64
    scale = wanted.diagonal().sqrt()
    torch.testing.assert_close(
        sums.covariance / torch.outer(scale, scale), wanted / torch.outer(scale, scale), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(sums.mean, features.double().mean(0), atol=1e-9, rtol=1e-9)


def test_shards_in_float32_give_the_fit_of_all_rows() -> None:
    features, targets, start = rows(400, 20), rows(400, 5, seed=1), torch.zeros(5, 20)
    whole, first, second = (NormalEquations(20, 5) for _ in range(3))
    whole.add(features.double(), targets.double())
    first.add(features[:90], targets[:90])
    second.add(features[90:].view(31, 10, 20), targets[90:].view(31, 10, 5))
    first.merge(second)
    for centred in (True, False):
        wanted, got = (sums.solve(start, 1e-3, centred=centred) for sums in (whole, first))
        torch.testing.assert_close(got[0], wanted[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            features.double() @ got[0].T + got[1], features.double() @ wanted[0].T + wanted[1], atol=1e-4, rtol=0
        )
