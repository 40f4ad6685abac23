"""What timm's ViTs of other origins have: activations, pools, norms; the full record is the same function."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models import (
    Arch,
    AttentionPool,
    Block,
    BlockCut,
    Cut,
    Stage,
    UserError,
    arch_of,
    build,
    cut,
    load,
    save,
)
from prunesweep.models.families import family_of
from prunesweep.models.tome import apply_tome
from prunesweep.pruners.subspaces.compression import compress
from prunesweep.pruners.subspaces.widths import Widths
from tests.contract_family import FamilyContract
from tests.generate import random_images, random_model, random_pooled_vit, random_vit
from tests.models.test_counting import counted_macs

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}


def check_same_function(model: nn.Module, arch: Arch) -> None:
    """The full record's module, with the model's weights, is the same function; records survive JSON."""
    assert Arch.from_json(arch.to_json()) == arch
    ours, x = build(arch).double().eval(), random_images(arch, 0)
    ours.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("vit_base_patch16_clip_quickgelu_224", "quick_gelu"),
        ("vit_base_patch16_siglip_gap_224", "gelu"),
        ("vit_giantopt_patch16_siglip_gap_256", "gelu_tanh"),
    ],
)
def test_activations_of_timm_s_names(name: str, act: str) -> None:
    model = timm.create_model(name, num_classes=0, mlp_ratio=2, **SMALL).double().eval()
    arch = Arch.from_timm(model)
    assert arch.act == act
    check_same_function(model, arch)


@pytest.mark.parametrize(
    ("layer", "act"),
    [(nn.GELU, "gelu"), ("gelu", "gelu"), (partial(nn.GELU, approximate="tanh"), "gelu_tanh"), ("silu", "silu")],
)
def test_activations_are_known_by_what_they_compute(layer: Any, act: str) -> None:
    model = VisionTransformer(num_classes=3, act_layer=layer, **SMALL).double().eval()
    arch = Arch.from_timm(model)
    assert arch.act == act
    check_same_function(model, arch)


def test_an_unknown_activation_is_refused() -> None:
    model = VisionTransformer(num_classes=3, act_layer=nn.ELU, **SMALL)
    with pytest.raises(UserError, match="block 0 has activation ELU; known: gelu, gelu_tanh, quick_gelu, silu"):
        Arch.from_timm(model)


@pytest.mark.parametrize(
    ("name", "options", "pool", "prefix"),
    [
        ("vit_base_patch16_siglip_224", {"mlp_ratio": 2}, "map", False),
        ("vit_so400m_patch14_siglip_224", {"mlp_ratio": 3.7, "img_size": 28}, "map", False),
        ("test_vit3", {"num_classes": 5, "mlp_ratio": 2, "depth": 2}, "map", True),
        ("vit_base_patch16_224", {"global_pool": "avg", "pool_include_prefix": True, "num_classes": 5}, "avg", True),
        ("vit_base_patch16_siglip_224", {"global_pool": "avg", "num_classes": 3, "fc_norm": False}, "avg", False),
    ],
)
def test_pools(name: str, options: dict[str, Any], pool: str, prefix: bool) -> None:
    model = timm.create_model(name, **{"num_classes": 0, **SMALL, **options}).double().eval()
    arch = Arch.from_timm(model)
    assert (arch.pool, arch.pool_prefix, arch.attn_pool is not None) == (pool, prefix, pool == "map")
    check_same_function(model, arch)


def test_a_source_of_any_image_size_is_read_at_one() -> None:
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=3, **SMALL).double().eval()
    with pytest.warns(UserWarning, match="takes images of any size; its record is for 32x32 images"):
        arch = Arch.from_timm(model)
    assert arch.img_size == (32, 32)
    check_same_function(model, arch)
    padded = VisionTransformer(**{**SMALL, "img_size": 30}, dynamic_img_size=True, dynamic_img_pad=True)
    with pytest.raises(UserError, match=r"pads images of \(30, 30\) to whole patches of \(16, 16\)"):
        Arch.from_timm(padded)


def pooled(width: int = 12) -> Arch:
    """A backbone with an attention pool of features of its own width."""
    blocks = tuple(Block(src=i, heads=2, qk=6, v=6, scale=6**-0.5, mlp=20) for i in range(2))
    return Arch(
        family="vit",
        source="small",
        img_size=(8, 8),
        patch_size=(2, 2),
        in_chans=1,
        num_classes=0,
        stages=(Stage(width=12, grid=(4, 4), blocks=blocks),),
        class_token=False,
        pool="map",
        attn_pool=AttentionPool(width=width, heads=2, mlp=24),
    )


def test_a_pool_gives_the_source_s_features_however_narrow_the_stream(tmp_path: Path) -> None:
    """No linear map is added; classifiers come and go as in timm; a pool that is taken away leaves the record."""
    arch = pooled()
    source: Any = random_model(arch, 0, torch.float32)
    x = random_images(arch, 0, dtype=torch.float32)
    small: Any = cut(source, Cut(embed=(tuple(range(0, 12, 2)),), blocks=(BlockCut(),) * 2))
    record = arch_of(small)
    assert (record.stages[0].width, record.outputs, record.feature_head, record.num_classes) == (6, 12, False, 0)
    assert load(save(small, tmp_path / "small"))(x).shape == (3, 12)
    small.reset_classifier(5)
    assert small(x).shape == (3, 5)
    assert arch_of(small) == dataclasses.replace(record, num_classes=5)
    assert arch_of(load(save(small, tmp_path / "classes"))).num_classes == 5
    small.reset_classifier(4, "avg")
    assert small(x).shape == (3, 4)
    assert arch_of(small) == dataclasses.replace(record, num_classes=4, pool="avg", attn_pool=None)


def test_an_attention_pool_is_projected_and_refitted() -> None:
    """Whole widths give the source; at half of the stream the pool's keys and values are refitted."""
    arch = pooled(width=10)
    source, x = random_model(arch, 0), random_images(arch, 0, batch=64)
    batches = [(part, None) for part in x.split(16)]
    same = compress(source, Widths.uniform(arch), batches)
    errors = []
    with torch.no_grad():
        torch.testing.assert_close(same(x), source(x), rtol=1e-8, atol=1e-8)
        for refit in (False, True):
            small = compress(source, Widths.uniform(arch, embed=8), batches, refit=refit)
            errors.append(float((small(x) - source(x)).square().mean()))
    assert arch_of(small).outputs == 10
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_pool": None}, "pool = 'map': needs attn_pool"),
        ({"pool": "avg"}, "pool = 'avg': leaves no room for attn_pool"),
        ({"attn_pool": AttentionPool(width=5, heads=2, mlp=3)}, "attn_pool.width = 5: must be a multiple of"),
        ({"attn_pool": AttentionPool(width=4, heads=0, mlp=3)}, "attn_pool.heads = 0: must be a whole number of at"),
        ({"head_norm": "pooled"}, "head_norm = 'pooled': is not for pool = 'map'"),
    ],
)
def test_impossible_pools_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(pooled(), **changes).validate()


@pytest.mark.parametrize("tens", range(3))
def test_pools_keep_the_family_s_contract(tens: int, tmp_path: Path) -> None:
    """Exact cost, masked source == cut model, streams that add up, projections that change nothing, saved bit-equal."""
    contract = FamilyContract("vit", random_pooled_vit)
    for seed in range(10 * tens, 10 * tens + 10):
        contract.check_cost(seed, counted_macs)
        contract.check_cut(seed)
        contract.check_axes(seed)
        contract.check_streams(seed)
    contract.check_projections(tens)
    contract.check_saved(tens, tmp_path / "model")


def test_tome_refuses_attention_pools() -> None:
    with pytest.raises(UserError, match="ToMe: small has an attention pool"):
        apply_tome(random_model(pooled(), 0), 2)


def factored(random: Random) -> Arch:
    """A ViT with a frozen factor per patch."""
    return dataclasses.replace(random_vit(random, True, True, True), pre_norm=False, patch_factors=True)


@pytest.mark.parametrize("seed", range(3))
def test_contract_with_factors_of_patches(seed: int, tmp_path: Path) -> None:
    contract = FamilyContract("vit", factored)
    contract.check_axes(seed)
    contract.check_models(seed)
    contract.check_cost(seed, counted_macs)
    contract.check_cut(seed)
    contract.check_streams(seed)
    contract.check_projections(seed)
    contract.check_saved(seed, tmp_path / "model")
    arch = factored(Random(seed))
    with pytest.raises(UserError, match="needs stem = None and pre_norm = False"):
        dataclasses.replace(arch, pre_norm=True).validate()
    with pytest.raises(UserError, match="dynamic_img_size = True: "):
        family_of(arch).make_dynamic(build(arch), arch)
