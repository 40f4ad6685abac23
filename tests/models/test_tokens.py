from __future__ import annotations

import dataclasses

import pytest
import torch

from models import Arch, Block, Stage, build
from models.tokens import DenseMerge, SparseMerge, default_groups


def arch_with(**block: object) -> Arch:
    own = Block(src=0, heads=2, qk=4, v=4, scale=0.5, mlp=8)
    return Arch(
        family="vit",
        source="test",
        img_size=(6, 8),
        patch_size=(2, 2),
        in_chans=1,
        num_classes=3,
        stages=(Stage(width=8, grid=(3, 4), blocks=(dataclasses.replace(own, **block),)),),
    )


def as_dense(sparse: SparseMerge) -> DenseMerge:
    tokens = len(sparse.assign)
    dense = DenseMerge(tokens, sparse.kept, 0).double()
    member = (sparse.assign[None] == torch.arange(sparse.kept)[:, None]).double()
    with torch.no_grad():
        dense.matrix.copy_(member * sparse.weight)
        dense.recover.copy_(member.T * sparse.recover[:, None])
    dense.takes_part.copy_(sparse.assign >= 0)
    return dense


def test_sparse_equals_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    sparse = SparseMerge(13, 4, 1).double()
    sparse.assign.copy_(torch.tensor([0, 1, -1, 1, 2, -1, 2, 2, 3, 3, 3, -1, 3]))
    with torch.no_grad():
        for p in sparse.parameters():
            p.copy_(torch.rand(p.shape, generator=generator))
    dense = as_dense(sparse)
    x = torch.randn(2, 13, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(sparse.merge(x), dense.merge(x))
    torch.testing.assert_close(sparse.spread(z, x), dense.spread(z, x))
    assert torch.equal(sparse.spread(z, x)[:, [2, 5, 11]], x[:, [2, 5, 11]])  # pruned tokens pass unharmed


@pytest.mark.parametrize("form", [SparseMerge, DenseMerge])
def test_a_new_plan_sums_and_averages_runs(form: type) -> None:
    merge = form(7, 4, 1)
    x = torch.arange(7.0).reshape(1, 7, 1)
    z = merge.merge(x)
    assert z.flatten().tolist() == [0, 1 + 2, 3 + 4, 5 + 6]
    assert merge.spread(z, x).flatten().tolist() == [0, 1.5, 1.5, 3.5, 3.5, 5.5, 5.5]


def test_groups_are_nearly_equal_and_prefix_tokens_alone() -> None:
    groups = default_groups(199, 60, 3)
    assert groups[:3].tolist() == [0, 1, 2]
    sizes = groups[3:].bincount()[3:]
    assert len(sizes) == 57
    assert int(sizes.max() - sizes.min()) <= 1
    assert groups.diff().min() >= 0


@pytest.mark.parametrize("merge", ["sparse", "dense"])
def test_a_plan_that_keeps_all_tokens_changes_nothing(merge: str) -> None:
    plain = build(arch_with()).double().eval()
    planned = build(arch_with(tokens=13, merge=merge)).double().eval()
    weights = planned.state_dict() | plain.state_dict()
    planned.load_state_dict(weights)
    x = torch.randn(2, 1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(planned(x), plain(x), rtol=0, atol=1e-12)


def test_the_block_works_on_merged_tokens() -> None:
    block = build(arch_with(tokens=5)).double().eval().blocks[0]
    x = torch.randn(2, 13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = block.token_merge.merge(x)
    assert z.shape == (2, 5, 8)
    z = z + block.attn(block.norm1(z))
    z = z + block.mlp(block.norm2(z))
    torch.testing.assert_close(block(x), block.token_merge.spread(z, x))
