from __future__ import annotations

from random import Random

import pytest
import torch
from torch import nn

from prunesweep.models import Arch, BlockCut, Cut, UserError, cut
from prunesweep.pruners import drop_order, kl_divergence, score_depth, upvit
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


def deep_arch(seed: int, family: str = "vit") -> Arch:
    """A record with at least two blocks to drop, heads of one width in every block."""
    archs = (random_arch(Random(s), family, ragged=False) for s in range(seed, 999))
    return next(a for a in archs if a.depth - len(a.stages) >= 2 and all(b.qk == b.v for b in a.blocks))


def labelled(*images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, torch.zeros(len(x))) for x in images]


def without(model: nn.Module, arch: Arch, gone: set[int]) -> nn.Module:
    return cut(model, Cut(blocks=tuple(BlockCut(keep=i not in gone) for i in range(arch.depth))))


def stages_of(arch: Arch) -> list[int]:
    return [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]


@pytest.mark.parametrize("family", ["vit", "pvt_v2", "swin", "swin_v2"])
@pytest.mark.parametrize("seed", [0, 3])
@torch.no_grad()
def test_order_is_greedy_and_every_stage_keeps_a_block(family: str, seed: int) -> None:
    """Against cut models: at every point the block goes whose loss changes the output least."""
    arch = deep_arch(seed, family)
    model = random_model(arch, seed)
    x = random_images(arch, seed, batch=8)
    done: list[tuple[int, int]] = []
    scores = score_depth(model, labelled(x[:5], x[5:]), progress=lambda *step: done.append(step))
    order, depth, stage = drop_order(scores), scores.vectors["depth"], stages_of(arch)
    rounds = arch.depth - len(arch.stages)
    assert len(set(order)) == len(order) == rounds
    assert done == [(i, rounds) for i in range(1, rounds + 1)]
    kept = [i for i in range(arch.depth) if i not in order]
    assert sorted(stage[i] for i in kept) == list(range(len(arch.stages)))
    assert torch.isinf(depth[kept]).all()
    z, last = model(x), 0.0
    for k, block in enumerate(order):
        left = [b for b in range(arch.depth) if b not in order[:k]]
        able = [b for b in left if sum(stage[i] == stage[b] for i in left) > 1]
        kl = {b: kl_divergence(z, without(model, arch, {*order[:k], b})(x)).sum().item() for b in able}
        assert block == min(able, key=lambda b: kl[b])
        last = max(kl[block], last)
        assert depth[block].item() == pytest.approx(last, rel=1e-7)
    assert depth[list(order)].diff().gt(0).all()


def test_the_model_is_left_as_it_was() -> None:
    arch = deep_arch(1)
    model = random_model(arch, 1).train()
    blocks, before = list(model.blocks), {name: t.clone() for name, t in model.state_dict().items()}
    score_depth(model, labelled(random_images(arch, 1)))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(a is b for a, b in zip(model.blocks, blocks, strict=True))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_family_that_cannot_be_scored_is_named() -> None:
    arch = random_arch(Random(0), "cait")
    with pytest.raises(
        UserError, match="is a 'cait': UP-ViT scores families vit, eva, beit, swin, swin_v2, sam, pvt_v2, lm"
    ):
        upvit.score_blocks(random_model(arch, 0), labelled(random_images(arch, 0)))
