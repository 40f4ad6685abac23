"""What timm's ViTs of other origins have: activations, pools, norms; the full record is the same function."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models import Arch, UserError, build
from tests.generate import random_images

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
