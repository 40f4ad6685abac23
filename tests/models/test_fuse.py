from __future__ import annotations

import copy
import dataclasses
from random import Random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunesweep.models import Arch, Block, Stage, UserError, arch_of, build
from prunesweep.models.fuse import FusedMerge, PrefixBlock, for_inference, fuse_tokens
from tests.generate import random_arch, random_images, random_model


def planned(*kept: int | None, merge: str | tuple[str, ...] = "sparse", **changes: object) -> Arch:
    forms = (merge,) * len(kept) if isinstance(merge, str) else merge
    own = Block(src=0, heads=2, qk=4, v=4, scale=0.5, mlp=8)
    plans = [{"tokens": c, "merge": form} if c else {} for c, form in zip(kept, forms, strict=True)]
    blocks = tuple(dataclasses.replace(own, src=i, **plan) for i, plan in enumerate(plans))
    image = {"img_size": (6, 8), "patch_size": (2, 2), "in_chans": 1}
    fixed = {"family": "vit", "source": "test", "num_classes": 3} | image
    return Arch(**(fixed | {"stages": (Stage(width=8, grid=(3, 4), blocks=blocks),)} | changes))


def model_of(arch: Arch, *, passing: tuple[int, ...] = ()) -> torch.nn.Module:
    """Any matrices, such that patches pass the blocks in ``passing`` by and no other."""
    model = random_model(arch, 3)
    for i, block in enumerate(model.blocks):
        if block.token_merge is None:
            continue
        everyone = build(arch).blocks[i].token_merge.state_dict()
        key = "assign" if "assign" in everyone else "takes_part"
        block.token_merge.state_dict()[key].copy_(everyone[key])
        if i in passing:
            getattr(block.token_merge, key)[-3:] = -1 if key == "assign" else False
    return model


def fused_places(model: torch.nn.Module) -> list[int]:
    return [i for i, block in enumerate(model.blocks) if isinstance(block.token_merge, FusedMerge)]


@pytest.mark.parametrize("merge", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("kept", "changes", "passing", "places"),
    [
        ((5, 6, None, 4, 7), {}, (), [0, 1, 3, 4]),
        ((5, 6, 7), {"reg_tokens": 2}, (), [0, 1, 2]),
        ((5, 6, 7), {"dist_token": True}, (1,), [2]),
        ((5, 6, 7, 8), {"pool": "avg"}, (0,), [1, 2, 3]),
        ((5, None), {"pool": "avg", "class_token": False}, (), []),
        ((5,), {}, (0,), [0]),
    ],
)
def test_the_same_function(
    kept: tuple[int | None, ...], changes: dict[str, object], passing: tuple[int, ...], places: list[int], merge: str
) -> None:
    arch = planned(*kept, merge=merge, **changes)
    model, x = model_of(arch, passing=passing), random_images(arch, 1)
    fused = fuse_tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)
    assert fused_places(fused) == places
    assert arch_of(model) == arch
    assert not fused_places(model)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(fused.parameters(), model.parameters(), strict=False))


def test_both_forms_in_one_model() -> None:
    arch = planned(5, 6, 7, merge=("sparse", "dense", "sparse"))
    model, x = model_of(arch), random_images(arch, 1)
    torch.testing.assert_close(fuse_tokens(model)(x), model(x), rtol=0, atol=1e-12)


def test_fewer_macs_between_dense_plans() -> None:
    """T (c', c) in place of R (N, c) and M (c', N), and one row of the last R."""
    arch = planned(5, 6, merge="dense")
    model = model_of(arch)

    def macs(module: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            module(random_images(arch, 0, batch=1))
        return counter.get_total_flops() // 2

    assert macs(model) - macs(fuse_tokens(model)) == 8 * ((13 * 5 + 6 * 13 - 6 * 5) + (13 - 1) * 6)


def test_only_planned_models_are_fused() -> None:
    arch = planned(None)
    with pytest.raises(UserError, match="test has no token plan"):
        fuse_tokens(random_model(arch, 0))


@pytest.mark.parametrize("family", ["vit", "eva", "beit"])
def test_a_head_of_prefix_tokens_needs_no_more_of_the_last_block(family: str) -> None:
    """Names of weights stay, and copies are of their own."""
    skipping = 0
    for seed in range(12):
        arch = random_arch(Random(seed), family)
        model, x = random_model(arch, seed), random_images(arch, seed)
        fused = for_inference(model)
        skipped = any(isinstance(module, PrefixBlock) for module in fused.modules())
        skipping += skipped
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-12)
            own = copy.deepcopy(fused)
            for parameter in fused.parameters():
                parameter.zero_()
            torch.testing.assert_close(own(x), expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        if skipped and not any(block.tokens for block in arch.blocks):
            assert list(fused.state_dict()) == list(model.state_dict())
    assert skipping


def test_what_the_last_block_saves() -> None:
    """12 patches ask for nothing, and go through no MLP."""
    arch = planned(None, None)
    model = random_model(arch, 0, torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        x = random_images(arch, 0, batch=1, dtype=torch.float32)
        model(x)
        whole = counter.get_total_flops()
        for_inference(model)(x)
    queries, products, out, mlp = 8 * 8, 13 * 8 * 2, 8 * 8, 2 * 8 * 8
    assert (2 * whole - counter.get_total_flops()) // 2 == 12 * (queries + products + out + mlp)


def test_other_heads_need_all_tokens() -> None:
    for changes in ({"pool": "avg"}, {"pool": "avg", "class_token": False}):
        model = random_model(planned(None, **changes), 0)
        assert not any(isinstance(module, PrefixBlock) for module in for_inference(model).modules())
