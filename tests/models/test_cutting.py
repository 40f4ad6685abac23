from __future__ import annotations

import dataclasses
from random import Random

import pytest
import timm
import torch

from prunesweep.models import Arch, Block, BlockCut, Cut, UserError, arch_of, cost, cut, cut_arch, num_params
from tests.generate import FAMILIES, random_arch, random_cut, random_images, random_model
from tests.oracle import masked


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(100))
def test_masked_source_equals_cut_model(family: str, seed: int) -> None:
    random = Random(seed)
    arch = random_arch(random, family)
    model, x = random_model(arch, seed), random_images(arch, seed)
    decision = random_cut(random, arch)
    small = cut(model, decision)
    assert arch_of(small) == cut_arch(arch, decision)
    assert num_params(small) == cost(arch_of(small)).params
    with torch.no_grad(), masked(model, decision):
        want = model(x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(10))
def test_a_cut_without_hidden_units_drops_the_mlp(family: str, seed: int) -> None:
    random = Random(seed)
    arch = random_arch(random, family)
    model, x = random_model(arch, seed), random_images(arch, seed)
    drawn = random_cut(random, arch)
    blocks = tuple(dataclasses.replace(own, mlp=()) if random.random() < 0.5 else own for own in drawn.blocks)
    decision = dataclasses.replace(drawn, blocks=blocks)
    small = cut(model, decision)
    kept = [own for own in blocks if own.keep]
    assert all(not record.mlp for record, own in zip(arch_of(small).blocks, kept, strict=True) if own.mlp == ())
    assert num_params(small) == cost(arch_of(small)).params
    assert Cut.from_dict(decision.to_dict()) == decision
    with torch.no_grad(), masked(model, decision):
        want = model(x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("autocast", [False, True])
def test_masked_source_equals_cut_model_in_low_precision(family: str, seed: int, autocast: bool) -> None:
    """In float32 to 1e-5; under bfloat16 autocast no further apart than the source is from itself in float32."""
    random = Random(seed)
    arch = random_arch(random, family)
    model, x = random_model(arch, seed, torch.float32), random_images(arch, seed, dtype=torch.float32)
    decision = random_cut(random, arch)
    small = cut(model, decision)
    with torch.no_grad(), masked(model, decision):
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            want = model(x).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = small(x).float()
    size = 1 + exact.abs().max().item()
    tolerance = 0.02 * size + 2 * (want - exact).abs().max().item() if autocast else 1e-5 * size
    torch.testing.assert_close(found, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(15))
def test_cuts_compose(family: str, seed: int) -> None:
    """Cutting what was cut already is one cut: the second indexes into the first."""
    random = Random(seed)
    arch = random_arch(random, family)
    model, x = random_model(arch, seed), random_images(arch, seed)
    first = cut(model, random_cut(random, arch))
    decision = random_cut(random, arch_of(first))
    with torch.no_grad(), masked(first, decision):
        want = first(x)
    with torch.no_grad():
        torch.testing.assert_close(cut(first, decision)(x), want, rtol=1e-9, atol=1e-9)


TINY = [
    ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}),
    ("swin_tiny_patch4_window7_224", {"img_size": 32, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 3)}),
    ("pvt_v2_b0", {"embed_dims": (8, 10, 20, 16), "num_heads": (1, 2, 5, 8)}),
]


@pytest.mark.parametrize(("name", "options"), TINY)
def test_identity_cut_of_a_timm_model_is_bit_equal(name: str, options: dict) -> None:
    model = timm.create_model(name, num_classes=5, **options).eval()
    same = cut(model, Cut(blocks=(BlockCut(),) * Arch.from_timm(model).depth))
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
        (((),), BlockCut(), "cut.embed[0] is empty"),
        (((0, 192),), BlockCut(), "cut.embed[0]: index 192 is outside 0..191"),
        (((3, 3),), BlockCut(), "cut.embed[0]: indices must ascend"),
        ((None, None), BlockCut(), "cut.embed has 2 entries for 1 stages"),
        (None, BlockCut(sr=(0,)), "cut.blocks[0].sr: index 0 is outside 0..-1"),
        (None, BlockCut(mlp=(-1, 4)), "cut.blocks[0].mlp: index -1 is outside 0..767"),
        (None, BlockCut(qk=((0, 1),)), "cut.blocks[0]: give both qk and v"),
        (None, BlockCut(qk=((0, 1), (64,)), v=((0,), (64,))), "heads keep different widths [1, 2]"),
        (None, BlockCut(qk=((0,),), v=((0,), (1,))), "qk has 1 heads, v has 2"),
    ],
)
def test_errors_say_where_and_what(embed: tuple | None, first: BlockCut, message: str) -> None:
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


def test_a_swin_head_keeps_channels_of_one_head() -> None:
    arch = Arch.from_timm("swin_tiny_patch4_window7_224")
    mixed = BlockCut(qk=((0, 32),), v=((0, 1),))
    with pytest.raises(UserError, match="a Swin head has position biases of its own"):
        cut_arch(arch, Cut(blocks=(mixed, *[BlockCut()] * 11)))


def test_convolutions_take_v_alone() -> None:
    conv = Block(src=0, mixer="conv3x3", heads=0, qk=0, v=8, scale=0.0, mlp=4)
    stage = dataclasses.replace(tiny().stages[0], blocks=(conv,))
    arch = dataclasses.replace(tiny(), stages=(stage,))
    assert cut_arch(arch, Cut(blocks=(BlockCut(v=((1, 5),)),))).blocks[0].v == 2
    with pytest.raises(UserError, match="a convolution takes v alone"):
        cut_arch(arch, Cut(blocks=(BlockCut(qk=((0,),), v=((0,),)),)))
