from __future__ import annotations

import dataclasses
from random import Random

import pytest
import timm
import torch

from models import Arch, BlockCut, Cut, UserError, arch_of, cost, cut, cut_arch, num_params
from tests.generate import random_arch, random_cut, random_images, random_model
from tests.oracle import masked


@pytest.mark.parametrize("seed", range(120))
def test_masked_source_equals_cut_model(seed: int) -> None:
    random = Random(seed)
    arch = random_arch(random)
    model, x = random_model(arch, seed), random_images(arch, seed)
    decision = random_cut(random, arch)
    small = cut(model, decision)
    assert arch_of(small) == cut_arch(arch, decision)
    assert num_params(small) == cost(arch_of(small)).params
    with torch.no_grad(), masked(model, decision):
        want = model(x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_masked_source_equals_cut_model_in_float32(seed: int) -> None:
    random = Random(seed)
    arch = random_arch(random)
    model, x = random_model(arch, seed, torch.float32), random_images(arch, seed, dtype=torch.float32)
    decision = random_cut(random, arch)
    with torch.no_grad(), masked(model, decision):
        want = model(x)
    with torch.no_grad():
        torch.testing.assert_close(cut(model, decision)(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_cuts_compose(seed: int) -> None:
    """Cutting what was cut already is one cut: the second indexes into the first."""
    random = Random(seed)
    arch = random_arch(random)
    model, x = random_model(arch, seed), random_images(arch, seed)
    first = cut(model, random_cut(random, arch))
    decision = random_cut(random, arch_of(first))
    with torch.no_grad(), masked(first, decision):
        want = first(x)
    with torch.no_grad():
        torch.testing.assert_close(cut(first, decision)(x), want, rtol=1e-9, atol=1e-9)


def test_identity_cut_of_a_timm_model_is_bit_equal() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5, depth=2).eval()
    same = cut(model, Cut(blocks=(BlockCut(), BlockCut())))
    weights = same.state_dict()
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(same(x), model(x))
    assert same.pretrained_cfg["mean"] == model.pretrained_cfg["mean"]


def test_the_source_and_its_mode_are_left_alone() -> None:
    arch = random_arch(Random(1), missing=False)
    model = random_model(arch, 1).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = cut(model, random_cut(Random(2), arch))
    assert small.training
    assert model.training
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_attention_scale_stays_the_sources() -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    block = arch.stages[0].blocks[0]
    narrow = BlockCut.aligned(block, heads=[0, 2], qk=range(16), v=range(24), mlp=None)
    small = cut_arch(arch, Cut(blocks=(narrow, *[BlockCut()] * 11)))
    cut_block = small.stages[0].blocks[0]
    assert (cut_block.heads, cut_block.qk, cut_block.v, cut_block.scale) == (2, 16, 24, 64**-0.5)


def test_dropped_blocks_are_absent_and_the_rest_keep_their_origin() -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    choices = [BlockCut(keep=i not in (3, 7)) for i in range(12)]
    small = cut_arch(arch, Cut(blocks=tuple(choices)))
    assert [b.src for b in small.stages[0].blocks] == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.parametrize("seed", range(20))
def test_json_round_trip(seed: int) -> None:
    decision = random_cut(Random(seed), random_arch(Random(seed)))
    assert Cut.from_dict(decision.to_dict()) == decision


def tiny() -> Arch:
    return dataclasses.replace(Arch.from_timm("deit_tiny_patch16_224"))


@pytest.mark.parametrize(
    ("embed", "first", "message"),
    [
        ((), BlockCut(), "cut.embed is empty"),
        ((0, 192), BlockCut(), "cut.embed: index 192 is outside 0..191"),
        ((3, 3), BlockCut(), "cut.embed: indices must ascend"),
        (None, BlockCut(mlp=(-1, 4)), "cut.blocks[0].mlp: index -1 is outside 0..767"),
        (None, BlockCut(qk=((0, 1),)), "cut.blocks[0]: give both qk and v"),
        (None, BlockCut(qk=((0, 1), (64,)), v=((0,), (64,))), "heads keep different widths [1, 2]"),
        (None, BlockCut(qk=((0,),), v=((0,), (1,))), "qk has 1 heads, v has 2"),
    ],
)
def test_errors_say_where_and_what(embed: tuple[int, ...] | None, first: BlockCut, message: str) -> None:
    with pytest.raises(UserError) as error:
        cut_arch(tiny(), Cut(embed=embed, blocks=(first, *[BlockCut()] * 11)))
    assert message in str(error.value)


def test_number_of_blocks_must_fit() -> None:
    with pytest.raises(UserError, match="cut.blocks has 1 entries for 12 blocks"):
        cut_arch(tiny(), Cut(blocks=(BlockCut(),)))


def test_one_block_must_stay() -> None:
    with pytest.raises(UserError, match="at least one block must be kept"):
        cut_arch(tiny(), Cut(blocks=(BlockCut(keep=False),) * 12))


def test_shared_qk_norm_needs_aligned_heads() -> None:
    arch = dataclasses.replace(tiny(), qk_norm=True)
    crooked = BlockCut(qk=((0,), (65,)), v=((0,), (64,)))
    with pytest.raises(UserError, match="every head must keep the same channels"):
        cut_arch(arch, Cut(blocks=(crooked, *[BlockCut()] * 11)))
