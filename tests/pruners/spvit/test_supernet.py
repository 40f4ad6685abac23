from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
from torch import nn

from prunesweep.models import Arch, Block, Stage, UserError, blocks_of, build, cut
from prunesweep.pruners.spvit.choices import spvit_cut
from prunesweep.pruners.spvit.cost import has_mixer_gates
from prunesweep.pruners.spvit.gates import CHOICES
from prunesweep.pruners.spvit.supernet import SearchAttention, SearchSwinBlock, Supernet, UnitGates
from tests.generate import random_arch, random_images, random_model


def swin(*, grid: int = 4, window: int = 2, mlp: int = 12) -> Arch:
    blocks = tuple(Block(src=i, heads=2, qk=4, v=4, scale=0.5, mlp=mlp, shifted=i == 1) for i in range(2))
    return Arch(
        family="swin",
        source="tiny",
        img_size=(grid, grid),
        patch_size=(1, 1),
        in_chans=1,
        num_classes=3,
        stages=(Stage(width=8, grid=(grid, grid), blocks=blocks, window=(window, window)),),
        class_token=False,
        pool="avg",
        norm_eps=1e-5,
    )


def make(arch: Arch, seed: int = 0, **options) -> tuple[nn.Module, Supernet]:
    model = random_model(arch, seed)
    return model, Supernet(model, arch, theta=1.5, **options)


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "hiera", "sam"])
@pytest.mark.parametrize("seed", range(12))
def test_a_chosen_sub_network_is_the_model_that_is_cut(family: str, seed: int) -> None:
    """Any record; with gates as they start, with random ones, and with the gates taken out again."""
    served = {"mlp_norm": False, "post_norm": False, "proj_bias": True}  # others are refused
    arch = dataclasses.replace(random_arch(Random(seed), family), **served)
    model, x = random_model(arch, seed), random_images(arch, seed)
    before, dense = dict(model.named_modules()), model(x)
    names = list(model.state_dict())
    net = Supernet(model, arch, theta=1.5)
    assert [own is not None for own in net.mixers] == [has_mixer_gates(block) for block in arch.blocks]
    assert [own is not None for own in net.units] == [block.mlp > 0 for block in arch.blocks]
    torch.testing.assert_close(model(x), dense, rtol=0, atol=0)

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for theta in net.thetas:
            theta.copy_(torch.randn(theta.shape, generator=generator) + 0.3)
            theta[0] = 1.0  # a unit stays, and a skip is rare
    kept = [None if own is None else tuple((own.theta > 0).nonzero()[:, 0].tolist()) for own in net.units]
    with torch.no_grad():
        chosen = model(x)
    choices = net.choices
    net.remove()
    assert dict(model.named_modules()) == before
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), dense, rtol=0, atol=0)
    small = cut(model, spvit_cut(arch, choices, kept))
    torch.testing.assert_close(chosen, small(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_training_with_all_gates_open_is_the_dense_model(family: str) -> None:
    arch = random_arch(Random(3), family, ragged=False, missing=False, extras=False)
    model, x = random_model(arch, 1), random_images(arch, 1)
    dense = model(x)
    net = Supernet(model, arch, theta=1.5)
    model.train()
    net.set_uniforms([torch.full_like(theta, 0.99) for theta in net.thetas])
    torch.testing.assert_close(model(x), dense, rtol=0, atol=1e-12)
    assert net.mixers
    counts = [norm.num_batches_tracked for gates in net.mixers for norm in (gates.bn_1x1, gates.bn_3x3)]
    assert counts == [1] * len(counts)  # both follow, chosen or not
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # as DDP wants it


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_closed_units_and_skipped_mixers_leave_the_residual_stream(family: str) -> None:
    arch = random_arch(Random(3), family, ragged=False, missing=False, extras=False)
    model, net = make(arch)
    model.train()
    net.set_uniforms([torch.zeros_like(theta) for theta in net.thetas])
    width, grid = arch.stages[0].width, arch.stages[0].grid
    x = torch.randn(2, *((arch.tokens,) if family == "vit" else grid), width, dtype=torch.float64)
    block = blocks_of(model)[0]
    mlp = block.mlp if family == "vit" else block.block.mlp
    y = block(x)
    scale = block.ls2.gamma if arch.layer_scale else 1.0
    torch.testing.assert_close(y, x + scale * mlp.fc2.bias, rtol=0, atol=1e-12)


def test_draws_follow_from_seed_step_and_rank() -> None:
    _, net = make(swin())

    def drawn() -> list[torch.Tensor]:
        return [gates.u for pair in zip(net.mixers, net.units, strict=True) for gates in pair]

    net.draw(0, 3)
    first = drawn()
    assert [len(u) for u in first] == [3, 12, 3, 12]
    assert len({float(u[0]) for u in first}) == 4
    net.draw(0, 4)
    assert not torch.equal(drawn()[1], first[1])
    net.draw(0, 3)
    assert all(torch.equal(a, b) for a, b in zip(drawn(), first, strict=True))


def test_convolutions_see_the_map_or_the_window() -> None:
    """A change in the lower right window reaches the pixel beyond its border, or it does not."""
    for scope, reached in (("map", True), ("window", False)):
        model, net = make(swin(), conv_scope=scope)
        with torch.no_grad():
            for gates in net.mixers:
                gates.theta.copy_(torch.tensor([1.0, 1.0, -1.0]))
        block, x = blocks_of(model)[0], torch.randn(1, 4, 4, 8, dtype=torch.float64)
        changed = x.clone()
        changed[:, 2, 2] += torch.randn(8, dtype=torch.float64)
        differs = (block(changed) - block(x)).abs().amax(-1)[0] > 1e-6
        assert bool(differs[2, 2])
        assert bool(differs[3, 3])
        assert bool(differs[1, 1]) == reached


def test_windows_that_do_not_divide_the_map_are_refused_in_window_scope() -> None:
    arch = swin(grid=5)
    Supernet(build(arch), arch, theta=1.5)
    with pytest.raises(UserError, match=r"windows of \[2, 2\] do not divide the map of stage 0, \[5, 5\]"):
        Supernet(build(arch), arch, theta=1.5, conv_scope="window")


def test_blocks_that_cannot_become_convolutions_keep_their_mixer() -> None:
    arch = random_arch(Random(0), "vit", extras=False, missing=False, ragged=False)
    (stage,) = arch.stages
    first = dataclasses.replace(stage.blocks[0], tokens=arch.prefix_tokens + 1)
    arch = dataclasses.replace(arch, stages=(dataclasses.replace(stage, blocks=(first, *stage.blocks[1:])),))
    model, net = make(arch)
    assert net.mixers[0] is None
    assert net.choices[0] == CHOICES[-1]
    assert not isinstance(blocks_of(model)[0].attn, SearchAttention)
    assert isinstance(blocks_of(model)[0].mlp.act, UnitGates)
    assert not any(isinstance(m, SearchSwinBlock) for m in model.modules())
