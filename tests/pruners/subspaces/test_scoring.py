from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunesweep.models import UserError, arch_of, cost
from prunesweep.pruners import WidthMethod, get_method, kl_divergence
from prunesweep.pruners.subspaces import compress, compressed_arch, projected_groups, projected_widths, score
from prunesweep.pruners.subspaces.scoring import BELOW, _units
from prunesweep.pruners.subspaces.widths import equal_shares
from prunesweep.training.jobs.one_shot import Budget, prune_once
from prunesweep.training.jobs.recovery import Recovery
from tests.pruners.subspaces.test_compress import images, made, outputs, vit

METHOD = get_method("subspaces", WidthMethod)


def test_losses_are_shared_out_along_their_lower_hull() -> None:
    """Widths 8, 6, 4, 2: the loss at 6 lies above the line from 8 to 4, so units 4 to 7 are worth the same."""
    found = _units({8: 0.0, 6: 3.0, 4: 4.0, 2: 10.0})
    torch.testing.assert_close(found, torch.tensor([BELOW * 3.0] * 2 + [3.0] * 2 + [1.0] * 4, dtype=torch.float64))


def test_what_a_source_does_not_use_is_worth_next_to_nothing() -> None:
    """Heads of width 6 whose queries, keys and values have rank 3, and units whose outputs nothing reads."""
    source = made(vit())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in source.blocks:
            for rows in torch.arange(36).split(6):
                low = torch.randn(6, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
                block.attn.qkv.weight[rows] = 0.2 * low.double()
            block.attn.qkv.bias.zero_()
            block.norm1.bias.zero_()
            block.mlp.fc2.weight[:, 8:] = 0
    found = score(source, images(200, 20)).vectors
    for i in range(3):
        for kind, used in (("qk", 3), ("v", 3), ("mlp", 8)):
            vector = found[f"blocks.{i}.{kind}"]
            assert vector[used:].max() < 1e-3 * vector[0], (i, kind)


def test_widths_of_one_path_are_better_than_equal_shares() -> None:
    source = made(vit(width=48))
    arch, batches = arch_of(source), images(300, 20)
    groups = projected_groups(arch, METHOD.groups)
    limit = 0.3 * cost(arch).macs
    reached = METHOD.decide(arch, score(source, batches), limit, groups=groups)
    assert 0.995 * limit <= reached.cost <= limit
    small = compress(source, projected_widths(arch, reached.cut), batches)
    assert cost(arch_of(small)).macs == reached.cost
    shares = (equal_shares(arch, share / 256) for share in range(256, 0, -1))
    even = next(widths for widths in shares if cost(compressed_arch(arch, widths)).macs <= limit)
    wanted = outputs(source)
    ours, theirs = (kl_divergence(wanted, outputs(model)).mean() for model in (small, compress(source, even, batches)))
    assert ours < theirs


def test_models_that_are_not_projected_are_refused(tmp_path: Path) -> None:
    source = made(vit()).float()
    recoveries = (None, Recovery())
    for recovery in recoveries:
        with pytest.raises(UserError, match="method 'subspaces' says how many units stay, not which"):
            prune_once(
                source, "digits", "subspaces", Budget(0.5), recovery=recovery, cache=tmp_path, progress=lambda *_: None
            )
