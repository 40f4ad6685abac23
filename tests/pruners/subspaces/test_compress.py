from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunesweep.models import Arch, Block, BlockCut, Cut, Stage, UserError, arch_of, build, cost, cut_arch, load, save
from prunesweep.pruners.subspaces import BlockWidths, NormalEquations, SourceStatistics, Widths, compress
from prunesweep.pruners.subspaces.maps import query_key_maps, residual_map, value_map

DTYPE = torch.float64


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


def vit(width: int = 24, depth: int = 3, **facts: Any) -> Arch:
    block = Block(src=0, heads=2, qk=6, v=6, scale=6**-0.5, mlp=32)
    blocks = tuple(dataclasses.replace(block, src=i) for i in range(depth))
    stage = Stage(width=width, grid=(3, 3), blocks=blocks)
    shape: dict[str, Any] = {"img_size": (12, 12), "patch_size": (4, 4), "in_chans": 3, "num_classes": 7}
    return Arch(family="vit", source="toy", stages=(stage,), **shape, **facts)


def made(arch: Arch, seed: int = 0) -> nn.Module:
    """A model of random weights whose norms, biases and scales are not at their defaults."""
    generator, model = torch.Generator().manual_seed(seed), build(arch).to(DTYPE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=DTYPE) * (0.3 if p.ndim > 1 else 0.2))
            if p.ndim == 1:
                p.add_(0.7)
    return model


def images(count: int = 40, batch: int = 8, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, 12, 12, generator=generator, dtype=DTYPE).split(batch))


@torch.no_grad()
def outputs(model: nn.Module, seed: int = 2) -> torch.Tensor:
    return model(images(16, 16, seed)[0])


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"layer_scale": True},
    "averaged": {"pool": "avg", "class_token": False, "head_norm": "pooled"},
    "averaged after the norm": {"pool": "avg"},
    "registers": {"reg_tokens": 2, "prefix_pos_embed": False},
    "distilled": {"dist_token": True},
    "q/k norm": {"qk_norm": True},
    "no bias": {"qkv_bias": False},
    "norm in front": {"pre_norm": True},
    "no last norm": {"pool": "avg", "head_norm": "none"},
}


@pytest.mark.parametrize("facts", VARIANTS.values(), ids=VARIANTS)
def test_full_widths_are_the_source(facts: dict[str, Any]) -> None:
    source = made(vit(**facts))
    same = compress(source, Widths.uniform(arch_of(source)), images())
    assert arch_of(same) == arch_of(source)
    torch.testing.assert_close(outputs(same), outputs(source), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("refit", [False, True])
def test_a_source_that_lies_in_a_subspace_is_recovered(refit: bool) -> None:
    """A wide model whose stream is a fixed map of a narrow one's computes the same, and so does its compression."""
    narrow = made(vit(width=16, norm_eps=1e-12))
    arch = vit(width=24, norm_eps=1e-12)
    basis = torch.linalg.eigh(torch.cov(torch.randn(24, 60, dtype=DTYPE)))[1]
    basis = torch.linalg.qr(torch.cat([torch.ones(24, 1, dtype=DTYPE), basis[:, :15]], 1))[0][:, 1:]
    T = residual_map(torch.cat([torch.zeros(24, 9, dtype=DTYPE), basis], 1), 16)  # wide to narrow
    wide, small = build(arch).to(DTYPE).eval(), narrow.state_dict()
    up = T.T  # of orthonormal rows: z up T = z
    torch.testing.assert_close(up @ T, torch.eye(16, dtype=DTYPE))
    gain, weights = (16 / 24) ** 0.5, {}
    for name, own in small.items():
        part = name.split(".")[-2] if "." in name else name
        if "norm" in part:  # gain and bias go into the readers
            weights[name] = (torch.ones if name.endswith("weight") else torch.zeros)(24, dtype=DTYPE)
        elif part in ("qkv", "fc1", "head"):
            norm = {"qkv": "norm1", "fc1": "norm2", "head": "norm"}[part]
            prefix = ".".join(name.split(".")[:2]) + "." if name.startswith("blocks") else ""
            g, beta = small[f"{prefix}{norm}.weight"], small[f"{prefix}{norm}.bias"]
            matrix = small[name.replace("bias", "weight")]
            weights[name] = (matrix * g) @ up * gain if name.endswith("weight") else own + matrix @ beta
        elif name == "patch_embed.proj.weight":
            weights[name] = torch.einsum("kcpq,kd->dcpq", own, up)
        else:  # writers, tokens and positions
            weights[name] = up.T @ own if name.endswith("weight") else own @ up
    wide.load_state_dict(weights)
    torch.testing.assert_close(outputs(wide), outputs(narrow), rtol=1e-9, atol=1e-9)
    again = compress(wide, Widths.uniform(arch, embed=16), images(), refit=refit)
    torch.testing.assert_close(outputs(again), outputs(narrow), rtol=1e-8, atol=1e-8)


def test_ranks_that_are_not_used_cost_nothing() -> None:
    """Queries, keys and values of rank 3 in heads of width 6 are found by subspaces of rank 3."""
    source: Any = made(vit())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in source.blocks:
            for part in range(3):
                for h in range(2):
                    rows = slice(part * 12 + h * 6, part * 12 + h * 6 + 6)
                    low = torch.randn(6, 3, generator=generator, dtype=DTYPE) @ torch.randn(
                        3, 24, generator=generator, dtype=DTYPE
                    )
                    block.attn.qkv.weight[rows] = 0.2 * low
            block.attn.qkv.bias.zero_()
            block.norm1.bias.zero_()
    small = compress(source, Widths.uniform(arch_of(source), qk=3, v=3), images())
    assert {(b.qk, b.v) for b in arch_of(small).blocks} == {(3, 3)}
    torch.testing.assert_close(outputs(small), outputs(source), rtol=1e-6, atol=1e-6)


def test_record_and_cost_are_those_of_a_chosen_cut() -> None:
    source = made(vit(layer_scale=True))
    arch = arch_of(source)
    small = compress(source, Widths.uniform(arch, embed=16, qk=4, v=3, mlp=20, drop=[1]), images())
    kept = BlockCut.aligned(arch.blocks[0], heads=range(2), qk=range(4), v=range(3), mlp=range(20))
    chosen = cut_arch(arch, Cut(embed=(tuple(range(16)),), blocks=(kept, BlockCut(keep=False), kept)))
    assert arch_of(small) == chosen
    assert cost(arch_of(small)) == cost(chosen)


def test_ragged_values_and_halves_of_blocks() -> None:
    source = made(vit())
    arch = arch_of(source)
    blocks = (BlockWidths(v=(2, 5)), BlockWidths(mixer="none"), BlockWidths(mlp_half=False, qk=2))
    small = compress(source, Widths(blocks=blocks), images())
    record = arch_of(small)
    assert record.blocks[0].v == (2, 5)
    assert (record.blocks[1].mixer, record.blocks[2].mlp) == ("none", 0)
    assert cost(record).macs < cost(arch).macs
    assert torch.isfinite(outputs(small)).all()


def test_what_is_refitted_is_nearer_to_the_source() -> None:
    source = made(vit(width=48))
    widths = Widths.uniform(arch_of(source), embed=24, mlp=20)
    plain, fitted = (compress(source, widths, images(200, 20), refit=refit) for refit in (False, True))
    wanted = outputs(source)
    assert (outputs(fitted) - wanted).square().mean() < 0.5 * (outputs(plain) - wanted).square().mean()


def test_statistics_of_shards_add_up_and_the_order_does_not_matter() -> None:
    source, batches = made(vit()), images()
    whole = SourceStatistics.collect(source, batches)
    first, second = SourceStatistics.collect(source, batches[:2]), SourceStatistics.collect(source, batches[2:])
    first.merge(second)
    assert (first.images, first.rows) == (whole.images, whole.rows) == (40, 400)
    torch.testing.assert_close(first.streams[0], whole.streams[0], rtol=1e-12, atol=1e-12)
    for i in range(3):
        torch.testing.assert_close(first.heads[i], whole.heads[i], rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(first.unit_variance(i), whole.unit_variance(i), rtol=1e-9, atol=1e-9)


def test_ridge_equals_plain_algebra() -> None:
    generator = np.random.default_rng(0)
    a, y, start = generator.normal(size=(50, 6)), generator.normal(size=(50, 4)), generator.normal(size=(4, 6))
    sums, other = NormalEquations(6, 4), NormalEquations(6, 4)
    sums.add(torch.tensor(a[:20]), torch.tensor(y[:20]))
    other.add(torch.tensor(a[20:]).reshape(5, 6, 6), torch.tensor(y[20:]).reshape(5, 6, 4))
    sums.merge(other)
    weight, bias = sums.solve(torch.tensor(start), 0.1)
    centred = a - a.mean(0)
    covariance = centred.T @ centred / 50
    residual = (y - y.mean(0)) - centred @ start.T
    ridge = covariance + 0.1 * covariance.diagonal().mean() * np.eye(6)
    wanted = start + np.linalg.solve(ridge, centred.T @ residual / 50).T
    np.testing.assert_allclose(weight.numpy(), wanted, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(bias.numpy(), y.mean(0) - wanted @ a.mean(0), rtol=1e-10, atol=1e-12)


def test_identities_of_the_maps() -> None:
    T = residual_map(torch.linalg.qr(torch.randn(9, 9, dtype=DTYPE))[0], 9)
    torch.testing.assert_close(T, torch.eye(9, dtype=DTYPE))
    ones = torch.ones(9, dtype=DTYPE) / 3
    basis = torch.linalg.qr(torch.cat([ones[:, None], torch.randn(9, 8, dtype=DTYPE)], 1))[0]
    T = residual_map(basis, 5)  # the last four columns of the basis are orthogonal to the ones
    torch.testing.assert_close(T.T @ T, torch.eye(5, dtype=DTYPE))
    torch.testing.assert_close(ones @ T, torch.ones(5, dtype=DTYPE) / 5**0.5)
    q, k = torch.randn(200, 6, dtype=DTYPE), torch.randn(200, 6, dtype=DTYPE)
    left, right = query_key_maps(q.T @ q / 200, k.T @ k / 200, 6)
    torch.testing.assert_close((q @ left.T) @ (k @ right.T).T, q @ k.T, rtol=1e-8, atol=1e-8)
    projection = torch.randn(9, 6, dtype=DTYPE)
    down, columns = value_map(q.T @ q / 200, projection, 6)
    torch.testing.assert_close(columns @ down, projection, rtol=1e-8, atol=1e-8)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    source = made(vit()).float()
    before = {name: t.clone() for name, t in source.state_dict().items()}
    small = compress(source, Widths.uniform(arch_of(source), embed=12, qk=3), [b.float() for b in images()])
    save(small, tmp_path / "small")
    x = images(4, 4)[0].float()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "small")(x), small(x))
    assert all(torch.equal(before[name], t) for name, t in source.state_dict().items())


@pytest.mark.parametrize(
    ("widths", "batches", "message"),
    [
        ({"embed": 25}, images(), r"widths.embed = 25: must lie in 2..24"),
        ({"qk": 7}, images(), r"widths.blocks\[0\].qk = 7: must lie in 1..6"),
        ({"mlp": 0}, images(), r"widths.blocks\[0\].mlp = 0: must lie in 1..32"),
        ({}, [], "0 calibration images: give at least 2"),
        ({}, images(1, 1), "1 calibration images: give at least 2"),
        ({}, [torch.full((2, 3, 12, 12), float("nan"), dtype=DTYPE)], "not finite"),
    ],
)
def test_bad_input_is_named(widths: dict[str, Any], batches: list[torch.Tensor], message: str) -> None:
    source = made(vit())
    with pytest.raises(UserError, match=message):
        compress(source, Widths.uniform(arch_of(source), **widths), batches)


def test_spaces_that_cannot_be_projected_are_refused() -> None:
    normed = made(vit(qk_norm=True))
    with pytest.raises(UserError, match=r"blocks\[0\].qk = 3: a norm acts on queries and keys of toy"):
        compress(normed, Widths.uniform(arch_of(normed), qk=3), images())
    broken = made(vit())
    with torch.no_grad():
        broken.get_parameter("blocks.0.mlp.fc2.weight").fill_(1e308)
    with pytest.raises(UserError, match="an activation is not finite"):
        SourceStatistics.collect(broken, images())


@pytest.mark.parametrize("spread", [0.0, 1e-9])
def test_features_that_do_not_vary_leave_the_map_as_it_was(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.randn(12, generator=generator), torch.randn(300, 12, generator=generator)
    features, start = 5 + base + spread * noise, torch.randn(3, 12, generator=generator)
    targets = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    sums = NormalEquations(12, 3)
    sums.add(features, targets)
    weight, bias = sums.solve(start, 1e-3)
    torch.testing.assert_close(weight, start.double(), atol=1e-2, rtol=0)
    torch.testing.assert_close((features.double() @ weight.T + bias).mean(0), targets.mean(0))
