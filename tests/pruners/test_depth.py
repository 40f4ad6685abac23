from __future__ import annotations

from random import Random

import pytest
import torch

from prunesweep.models import BlockCut, Cut, cut
from prunesweep.pruners import drop_order, kl_divergence, score_depth
from tests.generate import random_arch, random_images, random_model


def test_kl_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    source, changed = (torch.randn(50, 9, dtype=torch.float64, generator=generator) * 3 for _ in range(2))
    p, log_q = source.softmax(-1), changed.log_softmax(-1)
    want = (p * (source.log_softmax(-1) - log_q)).sum(-1)
    torch.testing.assert_close(kl_divergence(source, changed), want, rtol=1e-10, atol=1e-12)


def test_small_kl_keeps_its_digits() -> None:
    source = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    step = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    p = source.softmax(-1)
    variance = (p * step**2).sum() - (p * step).sum() ** 2
    for eps in (1e-4, 1e-7, 1e-10):  # KL -> eps^2 / 2 * Var_p[step]
        assert kl_divergence(source, source + eps * step).item() == pytest.approx(
            eps**2 / 2 * variance.item(), rel=1e-3
        )
    assert kl_divergence(source, source).item() == 0
    assert kl_divergence(source, source + 7).item() == pytest.approx(0, abs=1e-25)


def deep_arch(seed: int):
    return next(a for a in (random_arch(Random(s)) for s in range(seed, 99)) if a.depth >= 4)


def test_first_to_go_is_the_block_whose_loss_changes_least() -> None:
    arch = deep_arch(0)
    model = random_model(arch, 0)
    x = random_images(arch, 0, batch=8)
    scores = score_depth(model, [x[:5], x[5:]])
    with torch.no_grad():
        z = model(x)
        one_gone = []
        for b in range(arch.depth):
            choices = tuple(BlockCut(keep=i != b) for i in range(arch.depth))
            one_gone.append(kl_divergence(z, cut(model, Cut(blocks=choices))(x)).sum().item())
    order = drop_order(scores)
    assert order[0] == min(range(arch.depth), key=lambda b: one_gone[b])
    assert scores.vectors["depth"][order[0]].item() == pytest.approx(min(one_gone), rel=1e-9)


def test_order_is_greedy_and_leaves_one_block() -> None:
    arch = deep_arch(3)
    model = random_model(arch, 3)
    x = random_images(arch, 3, batch=6)
    done: list[tuple[int, int]] = []
    scores = score_depth(model, [x], progress=lambda *step: done.append(step))
    order = drop_order(scores)
    assert len(set(order)) == arch.depth - 1
    assert torch.isinf(scores.vectors["depth"]).sum() == 1
    total = arch.depth * (arch.depth + 1) // 2 - 1
    assert done == [(i, total) for i in range(1, total + 1)]
    with torch.no_grad():
        z = model(x)
        for k in range(1, len(order)):
            left = [b for b in range(arch.depth) if b not in order[:k]]
            kl = {
                b: kl_divergence(
                    z, cut(model, Cut(blocks=tuple(BlockCut(keep=i in left and i != b) for i in range(arch.depth))))(x)
                )
                .sum()
                .item()
                for b in left
            }
            assert order[k] == min(left, key=lambda b: kl[b])


def test_the_model_is_left_as_it_was() -> None:
    arch = deep_arch(1)
    model = random_model(arch, 1).train()
    blocks = list(model.blocks)
    score_depth(model, [random_images(arch, 1)])
    assert model.training
    assert all(a is b for a, b in zip(model.blocks, blocks, strict=True))
