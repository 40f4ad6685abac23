from __future__ import annotations

import itertools

import torch
from torch import nn

from prunesweep.models import build
from prunesweep.pruners.semi_structured import prune_2_4
from tests.pruners.nvit.test_schedule import vit


def is_2_4(weight: torch.Tensor) -> bool:
    """Whether of every four consecutive inputs of a weight (outputs, inputs) at most two are other than zero."""
    if weight.shape[-1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def model_of(**widths: int) -> nn.Module:
    torch.manual_seed(0)
    return build(vit(**widths)).eval()


def test_the_largest_two_of_four_stay() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(32, 16)
    before = layer.weight.detach().clone()
    assert not is_2_4(before)
    report = prune_2_4(nn.Sequential(layer))
    assert report.pruned == ("0",)
    assert report.params == 32 * 16
    assert is_2_4(layer.weight)
    for row, column in itertools.product(range(16), range(0, 32, 4)):
        four, now = before[row, column : column + 4], layer.weight[row, column : column + 4]
        best = max(itertools.combinations(range(4), 2), key=lambda pair: sum(four[i].abs() for i in pair))
        want = torch.tensor([four[i] if i in best else 0.0 for i in range(4)])
        assert torch.equal(now, want)
    again = layer.weight.detach().clone()
    prune_2_4(nn.Sequential(layer))
    assert torch.equal(layer.weight, again)


def test_of_equal_weights_the_first_two_stay() -> None:
    layer = nn.Linear(16, 16)
    nn.init.ones_(layer.weight)
    prune_2_4(layer)
    assert torch.equal(layer.weight, torch.tensor([1.0, 1, 0, 0]).repeat(16, 4))


def test_a_transformer_and_what_cannot_be_done() -> None:
    model = model_of(depth=2, width=32, heads=2, head=8, mlp=40)
    report = prune_2_4(model)
    assert report.pruned == tuple(f"blocks.{i}.attn.{part}" for i in (0, 1) for part in ("qkv", "proj"))
    assert set(report.skipped) == {"head", *(f"blocks.{i}.mlp.{part}" for i in (0, 1) for part in ("fc1", "fc2"))}
    assert report.skipped["blocks.0.mlp.fc1"] == "40 outputs: not a multiple of 16"
    assert report.skipped["blocks.0.mlp.fc2"] == "40 inputs: not a multiple of 16"
    modules = dict(model.named_modules())
    assert all(is_2_4(modules[name].weight) for name in report.pruned)
    assert not any(is_2_4(modules[name].weight) for name in report.skipped)
    assert model(torch.randn(2, 1, 4, 4)).isfinite().all()
