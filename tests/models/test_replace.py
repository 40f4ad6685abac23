from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch

from prunesweep.models import Arch, BlockCut, Cut, UserError, arch_of, cost, cut, cut_arch, num_params
from prunesweep.models.layers.token_merging import TokenPlan
from tests.generate import random_arch, random_cut, random_images, random_model, subset


def random_plan(random: Random, arch: Arch) -> TokenPlan:
    """Prefix tokens alone, patches merged in any way, some of them passing by."""
    prefix, patches = arch.prefix_tokens, arch.tokens - arch.prefix_tokens
    groups = random.randint(1, patches)
    rows = [*range(groups), *(random.randint(-1, groups - 1) for _ in range(patches - groups))]
    assign = (*range(prefix), *(prefix + row if row >= 0 else -1 for row in rows))
    weight = tuple(0.0 if row < 0 else random.uniform(0.3, 2) for row in assign)
    return TokenPlan(prefix + groups, assign, weight, random.choice(["sparse", "dense"]))


def random_replacements(random: Random, arch: Arch) -> Cut:
    """Another mixer and a token plan wherever a block can have one."""
    choices = []
    for block in arch.blocks:
        has_norm, mixes = (
            block.mixer != "none" or block.norm_residual,
            block.mixer == "attn" and arch.family != "pvt_v2",
        )
        mixers = ["none"] + ["norm"] * has_norm + ["conv1x1", "conv3x3"] * mixes
        mixer = random.choice(mixers) if random.random() < 0.5 else None
        kind = mixer or block.mixer
        plannable = arch.family == "vit" and not kind.startswith("conv") and not block.token_scale
        plannable = plannable and (kind == "attn" or block.mlp > 0)
        plan = random_plan(random, arch) if plannable and random.random() < 0.5 else None
        choices.append(BlockCut(mixer=mixer, tokens=plan))
    return Cut(blocks=tuple(choices))


@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2"])
@pytest.mark.parametrize("seed", range(30))
def test_narrowing_and_replacing_at_once_is_one_after_the_other(family: str, seed: int) -> None:
    random = Random(seed)
    arch = random_arch(random, family)
    model, x = random_model(arch, seed), random_images(arch, seed)
    widths = random_cut(random, arch)
    narrow = cut(model, widths)
    replaced = random_replacements(random, arch_of(narrow))
    choices = iter(replaced.blocks)
    both = Cut(
        embed=widths.embed,
        blocks=tuple(
            dataclasses.replace(own, mixer=(new := next(choices)).mixer, tokens=new.tokens) if own.keep else own
            for own in widths.blocks
        ),
    )
    assert Cut.from_dict(both.to_dict()) == both
    at_once, after = cut(model, both), cut(narrow, replaced)
    assert arch_of(at_once) == arch_of(after) == cut_arch(arch, both)
    assert num_params(at_once) == cost(arch_of(at_once)).params
    with torch.no_grad():
        assert torch.equal(at_once(x), after(x))


@pytest.mark.parametrize("mixer", ["conv1x1", "conv3x3"])
def test_a_convolution_is_the_mean_over_the_heads(mixer: str) -> None:
    """Against the definition, written out: every tap the mean of the heads' value weights; heads of unequal width."""
    arch = random_arch(Random(3), missing=False, extras=False, ragged=False)
    block = dataclasses.replace(arch.blocks[0], heads=2, v=(3, 5))
    stage = dataclasses.replace(arch.stages[0], blocks=(block, *arch.blocks[1:]))
    arch = dataclasses.replace(arch, stages=(stage,))
    model = random_model(arch, 0)
    replaced = cut(model, Cut(blocks=(BlockCut(mixer=mixer), *[BlockCut()] * (arch.depth - 1))))
    conv, _, _, out = replaced.blocks[0].attn.bconv
    attn = model.blocks[0].attn
    rows, columns = attn.qkv.weight[-8:], attn.proj.weight
    mean = torch.zeros(5, arch.stages[0].width, dtype=torch.float64)
    mean[:3] += rows[:3] / 2
    mean += rows[3:] / 2
    spread = torch.zeros(arch.stages[0].width, 5, dtype=torch.float64)
    spread[:, :3] += columns[:, :3] / 2
    spread += columns[:, 3:] / 2
    taps = 9 if mixer == "conv3x3" else 1
    for tap in range(taps):
        torch.testing.assert_close(conv.weight.flatten(2)[:, :, tap], mean)
    torch.testing.assert_close(out.weight[..., 0, 0], taps * spread)
    torch.testing.assert_close(out.bias, attn.proj.bias)


def test_the_source_shares_nothing_with_what_was_replaced() -> None:
    arch = random_arch(Random(5), missing=False, extras=False)
    model = random_model(arch, 5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = cut(model, Cut(blocks=(BlockCut(mixer="conv3x3"),) * arch.depth))
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_convolution_ends_a_token_plan() -> None:
    arch = random_arch(Random(5), missing=False, extras=False)
    planned = cut(random_model(arch, 5), Cut(blocks=(BlockCut(tokens=random_plan(Random(0), arch)),) * arch.depth))
    assert all(block.tokens for block in arch_of(planned).blocks)
    conv = cut(planned, Cut(blocks=(BlockCut(mixer="conv1x1"),) * arch.depth))
    assert all(block.tokens is None for block in arch_of(conv).blocks)


@pytest.mark.parametrize(
    ("name", "choice", "message"),
    [
        ("deit_tiny_patch16_224", BlockCut(mixer="conv5x5"), "cut.blocks[0].mixer = 'conv5x5': must be one of"),
        ("pvt_v2_b0", BlockCut(mixer="conv3x3"), "not family 'pvt_v2'"),
        ("deit_tiny_patch16_224", BlockCut(tokens=TokenPlan(3, (0, 1, 2), (1.0,) * 3)), "the block has 197 tokens"),
        ("swin_tiny_patch4_window7_224", BlockCut(tokens=TokenPlan(2, (0, 1), (1.0,) * 2)), "family 'swin' takes no"),
        (
            "deit_tiny_patch16_224",
            BlockCut(mixer="conv1x1", tokens=TokenPlan(2, (0, 1), (1.0,) * 2)),
            "mixer 'conv1x1' takes no token plan",
        ),
    ],
)
def test_errors_say_where_and_what(name: str, choice: BlockCut, message: str) -> None:
    arch = Arch.from_timm(name)
    with pytest.raises(UserError) as error:
        cut_arch(arch, Cut(blocks=(choice, *[BlockCut()] * (arch.depth - 1))))
    assert message in str(error.value)


def test_only_attention_becomes_a_convolution() -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    conv = cut_arch(arch, Cut(blocks=(BlockCut(mixer="conv3x3"),) * 12))
    assert conv.blocks[0].v == 64
    with pytest.raises(UserError, match="not a block with mixer 'conv3x3'"):
        cut_arch(conv, Cut(blocks=(BlockCut(mixer="conv1x1"),) * 12))
    bare = cut_arch(arch, Cut(blocks=(BlockCut(mixer="none", mlp=subset(Random(0), 768)),) * 12))
    assert (bare.blocks[0].heads, bare.blocks[0].v, bare.blocks[0].mixer) == (0, 0, "none")
