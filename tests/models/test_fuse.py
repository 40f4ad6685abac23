from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunesweep.models import Arch, Block, Stage, UserError, arch_of, build
from prunesweep.models.fuse import FusedMerge, fuse_tokens
from tests.generate import random_images, random_model


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
