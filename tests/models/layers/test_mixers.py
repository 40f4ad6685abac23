from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention
from timm.models.pvt_v2 import Block as PvtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunesweep.models import Arch, Block, blocks_of, build
from prunesweep.models.families.pvt_v2 import HeteroPvtBlock
from prunesweep.models.families.swin import HeteroSwinBlock
from prunesweep.models.layers.mixers import (
    ConvMixer,
    HeteroAttention,
    attend,
    kernel_width,
    with_heads_as_they_are,
)
from tests.generate import random_arch, random_images, random_model


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module) -> nn.Module:
    module.double().eval()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=i) * 0.3)
    return module


def test_equal_widths_are_timms_attention() -> None:
    stock = randomise(Attention(12, 3, attn_head_dim=5, qkv_bias=True))
    ours = HeteroAttention(12, 3, 5, (5, 5, 5), 5**-0.5).double()
    ours.load_state_dict(stock.state_dict())
    x = draw(2, 7, 12)
    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mask_heads", [0, 1, 4])
def test_ragged_heads_equal_one_head_after_another(mask_heads: int) -> None:
    widths, scale = (3, 1, 3, 2), 0.7
    q, k, v = draw(2, 4, 5, 6), draw(2, 4, 8, 6, seed=1), draw(2, 8, 9, seed=2)
    mask = draw(1, mask_heads, 5, 8, seed=3) if mask_heads else None
    parts, start = [], 0
    for h, width in enumerate(widths):
        logits = scale * q[:, h] @ k[:, h].mT
        if mask is not None:
            logits = logits + mask[:, h % mask_heads]
        parts.append(logits.softmax(-1) @ v[..., start : start + width])
        start += width
    found = attend(q, k, v, widths, scale, attn_mask=mask)
    torch.testing.assert_close(found, torch.cat(parts, -1), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("qk", "v"), [(6, 3), (3, 5), (4, 4), (1, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_zeros_in_memory_change_nothing(qk: int, v: int, masked: bool) -> None:
    """Only without gradients, and not beyond four times the narrower width."""
    q, k, values = draw(2, 2, 7, qk), draw(2, 2, 7, qk, seed=1), draw(2, 7, 2 * v, seed=2)
    options = {"attn_mask": draw(1, 2, 7, 7, seed=3)} if masked else {}
    heads = rearrange(values, "b n (h v) -> b h n v", h=2)
    with torch.no_grad():
        assert kernel_width(q, heads) == {(6, 3): 6, (3, 5): 5}.get((qk, v))
        found = attend(q, k, values, (v, v), 0.3, **options)
    assert found.shape == (2, 7, 2 * v)
    with sdpa_kernel(SDPBackend.MATH):
        assert kernel_width(q, heads) is None
        torch.testing.assert_close(found, attend(q, k, values, (v, v), 0.3, **options), rtol=0, atol=1e-14)
    assert kernel_width(q.requires_grad_(), heads) is None


def test_heads_as_they_are() -> None:
    """Only while that copy runs, also where it fails."""
    seen = []

    class Probe(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            seen.append(kernel_width(q, q[..., :2]))
            assert q.shape[0]
            return q

    plain = Probe()
    own = with_heads_as_they_are(plain)
    q = draw(1, 1, 2, 4)
    with torch.no_grad():
        own(q)
        plain(q)
        with pytest.raises(AssertionError):
            own(q[:0])
        plain(q)
    assert seen == [None, 4, None, 4]


def test_token_scale_multiplies_query_key_and_value() -> None:
    ours = randomise(HeteroAttention(6, 2, 3, (2, 4), 0.5, tokens=5))
    plain = HeteroAttention(6, 2, 3, (2, 4), 0.5).double()
    weights = ours.state_dict()
    factor = weights.pop("token_scale")
    plain.load_state_dict(weights)
    x = draw(2, 5, 6)
    torch.testing.assert_close(ours(x), plain(x))  # ones at first
    factor.copy_(1 + torch.arange(5.0)[:, None])
    qkv = plain.qkv(x) * factor
    plain.qkv = nn.Identity()
    torch.testing.assert_close(ours(x), plain(qkv))


@pytest.mark.parametrize(("kernel", "prefix"), [(1, 0), (3, 0), (3, 2)])
def test_convolution_over_the_grid(kernel: int, prefix: int) -> None:
    mixer: ConvMixer = randomise(ConvMixer(6, 4, kernel, (2, 3), prefix))  # type: ignore[assignment]
    x = draw(2, prefix + 6, 6)
    first, norm, _, last = mixer.bconv
    x_map = x[:, prefix:].mT.reshape(2, 6, 2, 3)
    hidden = F.relu(norm(F.conv2d(x_map, first.weight, first.bias, padding=kernel // 2)))
    want = F.conv2d(hidden, last.weight, last.bias).flatten(2).mT
    found = mixer(x)
    torch.testing.assert_close(found[:, prefix:], want)
    assert torch.equal(found[:, :prefix], x[:, :prefix])


def test_a_class_token_passes_a_convolution_normalised() -> None:
    """SPViT: the residual then gives x_cls + LN1(x)_cls."""
    conv = Block(src=0, mixer="conv3x3", heads=0, qk=0, v=4, scale=0.0, mlp=0)
    arch = random_arch(Random(3), missing=False, extras=False)
    stage = dataclasses.replace(arch.stages[0], blocks=(conv,))
    block = random_model(dataclasses.replace(arch, stages=(stage,), layer_scale=False), 0).blocks[0]
    x = draw(2, arch.tokens, stage.width)
    want = (x + block.norm1(x))[:, : arch.prefix_tokens]
    torch.testing.assert_close(block(x)[:, : arch.prefix_tokens], want)


@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2"])
@pytest.mark.parametrize("norm_residual", [False, True])
def test_a_missing_mixer(family: str, norm_residual: bool) -> None:
    none = Block(src=0, mixer="none", heads=0, qk=0, v=0, scale=0.0, mlp=0, norm_residual=norm_residual)
    arch = dataclasses.replace(random_arch(Random(3), family, missing=False, extras=False), layer_scale=False)
    stage = dataclasses.replace(arch.stages[0], blocks=(none,))
    model = random_model(dataclasses.replace(arch, stages=(stage, *arch.stages[1:])), 0)
    block = blocks_of(model)[0]
    if family == "swin":
        x = draw(2, *stage.grid, stage.width)
        found = block(x)
    else:
        x = draw(2, arch.tokens if family == "vit" else stage.grid[0] * stage.grid[1], stage.width)
        found = block(x) if family == "vit" else block(x, stage.grid)
    torch.testing.assert_close(found, x + block.norm1(x) if norm_residual else x)


@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
@pytest.mark.parametrize("shifted", [False, True])
def test_hetero_swin_block_equals_timms(grid: tuple[int, int], shifted: bool) -> None:
    arch = Arch.from_timm("swin_tiny_patch4_window7_224")
    block = Block(src=0, heads=3, qk=4, v=4, scale=0.5, mlp=10, shifted=shifted)
    stage = dataclasses.replace(arch.stages[0], width=12, grid=grid, blocks=(block,), window=(4, 3))
    stock = SwinTransformerBlock(12, grid, 3, 4, window_size=(4, 3), shift_size=(2, 1) if shifted else 0, mlp_ratio=0.9)
    randomise(stock)
    ours = HeteroSwinBlock(arch, stage, block, drop_path=0.0, norm_layer=nn.LayerNorm).double().eval()
    ours.load_state_dict(stock.state_dict())
    x = draw(2, *grid, 12)
    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("ratio", [1, 2])
def test_hetero_pvt_block_equals_timms(ratio: int) -> None:
    arch = Arch.from_timm("pvt_v2_b0")
    block = Block(src=0, heads=3, qk=4, v=4, scale=0.5, mlp=24, sr=12 if ratio > 1 else 0)
    stage = dataclasses.replace(arch.stages[0], width=12, grid=(5, 6), blocks=(block,), sr_ratio=ratio)
    stock = randomise(PvtBlock(12, 3, mlp_ratio=2, sr_ratio=ratio, qkv_bias=True))
    ours = HeteroPvtBlock(arch, stage, block, drop_path=0.0, norm_layer=nn.LayerNorm).double().eval()
    ours.load_state_dict(stock.state_dict())
    for module in (*ours.modules(), *stock.modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    x = draw(2, 30, 12)
    torch.testing.assert_close(ours(x, (5, 6)), stock(x, (5, 6)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2"])
@pytest.mark.parametrize("seed", range(4))
def test_every_parameter_gets_a_gradient_and_timms_extras_work(family: str, seed: int) -> None:
    arch = random_arch(Random(seed), family)
    model = build(arch, drop_path=0.1).double().train()
    x = random_images(arch, seed)
    model(x).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not [name for name in without if "token" not in name]  # a prefix token may be dropped by average pooling
    model.set_grad_checkpointing(True)
    assert torch.isfinite(model(x)).all()
    _, features = model.eval().forward_intermediates(x)
    assert len(features) == (arch.depth if family == "vit" else len(arch.stages))
    model.reset_classifier(9)
    assert model(x).shape == (3, 9)
