from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
import torch.nn.functional as F

from prunesweep.models import Arch, UserError, arch_of, cut
from prunesweep.pruners import nvit, vector_sizes
from prunesweep.pruners.nvit.saliency import KINDS, raw_saliency
from tests.generate import random_arch, random_cut, random_images, random_model


def labelled(arch: Arch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = random_images(arch, seed, batch=5)
    return x, torch.arange(len(x)) % arch.num_classes


@pytest.mark.parametrize("seed", range(12))
def test_every_unit_of_any_shape_is_scored(seed: int) -> None:
    """Heterogeneous models too, so that what was cut can be scored and cut again."""
    arch = random_arch(Random(seed), ragged=False, extras=False)
    model = random_model(arch, seed)
    model.train()
    scores = nvit.score(model, [labelled(arch, 1), labelled(arch, 2)])
    assert {name: len(v) for name, v in scores.vectors.items()} == vector_sizes(arch, KINDS)
    assert all(v.dtype == torch.float64 and (v >= 0).all() for v in scores.vectors.values())
    assert scores.provenance["images"] == 10
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("seed", range(12))
def test_identities_of_scale_invariance(seed: int) -> None:
    """Sum of w*g over Q rows equals that over K rows, and over V rows that over projection columns."""
    # with q/k norm, scaling Q is not undone by scaling K
    arch = dataclasses.replace(random_arch(Random(seed), ragged=False, missing=False, extras=False), qk_norm=False)
    model = random_model(arch, seed)
    x, y = labelled(arch, seed)
    F.cross_entropy(model(x), y).backward()
    raw = raw_saliency(model, arch)
    for i, block in enumerate(arch.stages[0].blocks):
        attn = model.blocks[i].attn
        rows = (attn.qkv.weight * attn.qkv.weight.grad).sum(1)
        if attn.qkv.bias is not None:
            rows = rows + attn.qkv.bias * attn.qkv.bias.grad
        width = block.heads * block.qk
        k = rows[width : 2 * width].view(block.heads, -1).sum(0)
        torch.testing.assert_close(raw[f"blocks.{i}.qk"], k, rtol=1e-7, atol=1e-10)
        columns = (attn.proj.weight * attn.proj.weight.grad).sum(0).view(block.heads, -1).sum(0)
        torch.testing.assert_close(raw[f"blocks.{i}.v"], columns, rtol=1e-7, atol=1e-10)


def test_pvt_units_are_worth_what_scaling_their_weights_changes() -> None:
    """A channel of a reduced map, and one of a stage's residual stream, with all tensors that write or read it."""
    arch = next(
        arch
        for seed in range(1000)
        if (arch := random_arch(Random(seed), "pvt_v2", ragged=False, missing=False, extras=False)).blocks[0].sr
    )
    model, (x, y) = random_model(arch, 0), labelled(arch, 0)
    F.cross_entropy(model(x), y).backward()
    raw = raw_saliency(model, arch)
    block = model.stages[0].blocks[0]
    reduced = [block.attn.sr.weight.data[1], block.attn.sr.bias.data[1:2]]
    stream = [model.patch_embed.proj.weight.data[2], model.patch_embed.proj.bias.data[2:3]]
    for own in model.stages[0].blocks:
        attn = own.attn
        read = (attn.q, own.mlp.fc1, *((attn.sr,) if attn.sr is not None else (attn.kv,)))
        stream += [layer.weight.data[:, 2] for layer in read]
        stream += [part.data[2:3] for layer in (attn.proj, own.mlp.fc2) for part in (layer.weight, layer.bias)]
    for name, unit, tensors in (("blocks.0.sr", 1, reduced), ("stages.0.embed", 2, stream)):
        losses = []
        for step in (1e-5, -1e-5):
            for tensor in tensors:
                tensor.mul_(1 + step)
            with torch.no_grad():
                losses.append(float(F.cross_entropy(model(x), y)))
            for tensor in tensors:
                tensor.div_(1 + step)
        assert float(raw[name][unit]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_a_unit_that_does_nothing_scores_nothing() -> None:
    arch = random_arch(Random(3), ragged=False, missing=False, extras=False)
    model = random_model(arch, 3)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[:, 1] = 0
    scores = nvit.score(model, [labelled(arch, 1)])
    vector = scores.vectors["blocks.0.mlp"]
    assert vector[1] == 0
    assert (vector > 0).sum() == len(vector) - 1


def test_ragged_heads_are_refused_by_name() -> None:
    arch = next(
        a
        for a in (random_arch(Random(s), extras=False) for s in range(50))
        if any(isinstance(b.v, tuple) for b in a.stages[0].blocks)
    )
    with pytest.raises(UserError, match="is ragged"):
        nvit.score(random_model(arch, 0), [labelled(arch, 0)])


def test_a_cut_model_can_be_scored() -> None:
    random = Random(8)
    arch = random_arch(random, ragged=False, missing=False, extras=False)
    small = cut(random_model(arch, 8), random_cut(random, arch))
    if all(isinstance(b.v, int) for b in arch_of(small).stages[0].blocks):
        assert nvit.score(small, [labelled(arch, 0)]).vectors
