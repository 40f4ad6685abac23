from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from prunesweep.models import UserError
from prunesweep.models.recalibrate import recalibrate


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(size, 3, 4, 5, generator=generator, dtype=torch.float64) for size in sizes)
    return [(2 * x + i, torch.zeros(len(x), dtype=torch.long)) for i, x in enumerate(draws)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), DropPath(0.9), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)]
    return nn.Sequential(*layers).double()


def test_statistics_are_the_average_over_batches_of_what_training_sees() -> None:
    model = network()
    with torch.no_grad():
        model(10 + batches(4)[0][0])  # statistics of something else
    model[0].eval()
    before = {name: t.clone() for name, t in model.named_parameters()}
    given = batches(4, 4, 4)
    assert recalibrate(model, given) == 2
    with torch.no_grad():
        first = [model[0](x) for x, _ in given]
        normal = [
            (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
            for y in first
        ]
        second = [model[4]((y * model[1].weight[:, None, None] + model[1].bias[:, None, None]).relu()) for y in normal]
    for norm, outputs in ((model[1], first), (model[5], second)):
        mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
        var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=0, atol=1e-12)
        assert norm.momentum == 0.1
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert [m.training for m in model] == [False, True, True, True, True, True]


def test_a_model_without_statistics_is_left_alone_and_no_batches_are_an_error() -> None:
    assert recalibrate(nn.Linear(2, 2), []) == 0
    with pytest.raises(UserError, match="no batch to recalibrate BatchNorm with"):
        recalibrate(network(), [])
