from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from prunesweep.pruners.spvit.gates import CHOICES, choice_of, cumulate, expect, is_open, sample, uniforms

P = 1 / (1 + math.exp(-1.5))  # of SPViT's start


def test_a_gate_is_open_as_often_as_its_probability_says() -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for theta in (-1.0, 0.0, 1.5):
        drawn = sample(torch.full((1000,), theta, dtype=torch.float64), u)
        assert drawn.mean().item() == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-3)
        assert set(drawn.tolist()) == {0.0, 1.0}
    assert torch.equal(sample(torch.tensor([9.0, -9.0]), torch.tensor([0.0, 1.0])).isfinite(), torch.tensor([True] * 2))


def test_choices_at_the_start_have_the_probabilities_of_the_method() -> None:
    """msa .546, conv3x3 .122, conv1x1 .149, skip .182."""
    found = dict.fromkeys(CHOICES, 0.0)
    for bits in product((0.0, 1.0), repeat=3):
        gates = cumulate(torch.tensor(bits))
        found[CHOICES[int(gates.sum())]] += math.prod(P if bit else 1 - P for bit in bits)
    assert {name: round(share, 3) for name, share in found.items()} == {
        "msa": 0.546,
        "conv3x3": 0.122,
        "conv1x1": 0.149,
        "skip": 0.182,
    }


def test_only_the_last_open_gate_and_closed_ones_get_gradients() -> None:
    """The table of dL/dg in terms of the three branches, from y = g2 M + g1(1-g2) C3 + g0(1-g1)(1-g2) C1."""
    M, C3, C1 = 5.0, 3.0, 2.0
    wanted = {
        (1, 1, 1): (0, 0, M - C3),
        (1, 1, 0): (0, C3 - C1, M - C3),
        (1, 0, 0): (C1, C3 - C1, M - C1),
        (0, 0, 0): (C1, C3, M),
    }
    for bits, want in wanted.items():
        drawn = torch.tensor(bits, dtype=torch.float64, requires_grad=True)
        gates = cumulate(drawn)
        g0, g1, g2 = gates.detach().requires_grad_()
        slopes = torch.autograd.grad(g2 * M + g1 * (1 - g2) * C3 + g0 * (1 - g1) * (1 - g2) * C1, (g0, g1, g2))
        # what reaches the draws: slopes through cumulated products, without those that are cut off
        kept = [0 if i < 2 and bits[i + 1] else s for i, s in enumerate(slopes)]
        assert tuple(float(s) for s in kept) == want
        (got,) = torch.autograd.grad((gates * torch.stack(slopes)).sum(), drawn)
        through = [
            sum(kept[i] * math.prod(bits[j] for j in range(i + 1) if j != k) for i in range(k, 3)) for k in range(3)
        ]
        assert got.tolist() == [float(t) for t in through]


def test_the_gate_of_the_complexity_loss() -> None:
    theta = torch.tensor([-1.5, -0.1, 0.1, 1.5, 0.0], dtype=torch.float64, requires_grad=True)
    gates = expect(theta)
    assert gates.tolist() == [0, 0, 1, 1, 0]
    assert torch.equal(gates > 0.5, is_open(theta))
    (slope,) = torch.autograd.grad(gates.sum(), theta)
    assert slope[-1].item() == pytest.approx(0.0625)
    assert slope[0].item() == pytest.approx(0.0364, abs=1e-4)
    assert expect(torch.tensor([4.0])).item() == 1.0  # to the last bit in single precision


def test_a_prefix_of_open_gates_is_a_choice() -> None:
    assert [choice_of(torch.tensor(t)) for t in ([-1, 1, 1], [1, -1, 1], [1, 1, -1], [1, 1, 1])] == list(CHOICES)


def test_uniform_numbers_follow_from_seed_step_and_rank() -> None:
    first = uniforms([3, 8], 0, 5)
    assert [len(u) for u in first] == [3, 8]
    assert all(torch.equal(a, b) for a, b in zip(first, uniforms([3, 8], 0, 5), strict=True))
    for other in ((1, 5, 0), (0, 6, 0), (0, 5, 1)):
        assert not torch.equal(first[1], uniforms([3, 8], *other)[1])
