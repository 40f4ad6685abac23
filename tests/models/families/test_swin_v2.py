"""Swin V2: the full record is the same function; heads keep their factors; sizes may change."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.models._registry import _model_to_module

from prunesweep.models import Arch, BlockCut, Cut, UserError, adopted, arch_of, build, cost, cut, num_params
from prunesweep.models.families import family_of
from prunesweep.models.without_values import without_values
from tests.generate import random_images, random_swin_v2

SMALL = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
CASES: list[dict[str, Any]] = [
    {},
    {"img_size": (36, 28), "window_size": 3},
    {"pretrained_window_sizes": (6, 5)},
    {"qkv_bias": False},
    {"img_size": (40, 24), "window_size": 8, "num_classes": 0},
    {"window_size": 2, "patch_size": 2, "in_chans": 1, "mlp_ratio": 3, "depths": (1, 2, 1), "num_heads": (1, 2, 2)},
]


def small(**options: Any) -> Any:
    """A narrow timm model with random norms, factors and biases."""
    model = timm.create_model("swinv2_tiny_window8_256", **{**SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
        model.layers[0].blocks[0].attn.logit_scale[0] = 6.0  # more than it may be
    return model.double()


@pytest.mark.parametrize("options", CASES)
def test_an_adopted_model_is_the_same_function(options: dict[str, Any]) -> None:
    model = small(**options)
    own, x = adopted(model), random_images(Arch.from_timm(model), 1)
    arch = arch_of(own)
    assert Arch.from_json(arch.to_json()) == arch == Arch.from_timm(model)
    assert cost(arch).params == num_params(own) == num_params(model)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_pretrained()}
    names = sorted(name for name in found if _model_to_module[name] == "swin_transformer_v2")
    for name in names:
        with without_values():
            model = timm.create_model(name, depths=(2, 2, 2, 2))  # all blocks of a stage are alike, or shifted
            arch = Arch.from_timm(model)
            own, given = build(arch).state_dict(), family_of(arch).adopted(model, arch)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}, name
        assert cost(arch).params == num_params(model)
    assert len(names) == 12


def test_another_image_size_has_other_windows() -> None:
    model = small(pretrained_window_sizes=(6, 0))
    own = adopted(model)
    for sized in (model, own):
        sized.set_input_size((48, 32))
    arch = arch_of(own)
    assert [(stage.grid, stage.window) for stage in arch.stages] == [((12, 8), (6, 4)), ((6, 4), (6, 4))]
    x = random_images(arch, 0)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cut(own, Cut(blocks=(BlockCut(),) * 4))(x), own(x))


def test_heads_keep_their_factors_and_biases() -> None:
    model: Any = adopted(small())
    second = BlockCut(qk=(tuple(range(8, 12)),), v=(tuple(range(8, 16)),))
    narrow: Any = cut(model, Cut(blocks=(second, *[BlockCut()] * 3)))
    own, wide = narrow.layers[0].blocks[0].attn, model.layers[0].blocks[0].attn
    assert torch.equal(own.logit_scale, wide.logit_scale[1:])
    torch.testing.assert_close(own._get_rel_pos_bias(), wide._get_rel_pos_bias()[:, 1:])


def test_what_its_records_cannot_have_is_refused() -> None:
    arch = random_swin_v2(Random(1), ragged=False, missing=False, extras=False)
    (block, *rest), stage = arch.stages[0].blocks, arch.stages[0]
    scaled = dataclasses.replace(stage, blocks=(dataclasses.replace(block, scale=0.5), *rest))
    with pytest.raises(UserError, match=r"blocks\[0\].scale = 0.5: must be 1"):
        dataclasses.replace(arch, stages=(scaled, *arch.stages[1:])).validate()
    conv = dataclasses.replace(block, mixer="conv1x1", heads=0, qk=0, v=3, scale=0.0, shifted=False)
    with pytest.raises(UserError, match="mixer = 'conv1x1': is for families"):
        dataclasses.replace(
            arch, stages=(dataclasses.replace(stage, blocks=(conv, *rest)), *arch.stages[1:])
        ).validate()
    with pytest.raises(UserError, match="needs k_bias = False"):
        dataclasses.replace(arch, k_bias=True).validate()
    stages = (dataclasses.replace(arch.stages[0], reference_window=(2, 2)),)
    v1 = dataclasses.replace(arch, family="swin", k_bias=True, post_norm=False, stages=stages)
    with pytest.raises(UserError, match="family 'swin' has no distances in parts of a window"):
        v1.validate()
