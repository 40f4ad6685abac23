from __future__ import annotations

import copy
import dataclasses
from random import Random

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunesweep.models import Arch, UserError, arch_of, cost
from prunesweep.models.tome import apply_tome, match, tome_macs, tome_schedule
from tests.generate import random_arch, random_images, random_model
from tests.models.test_fuse import planned


def source(seed: int) -> Arch:
    """Any ViT that keeps no grid: every prefix token, pooling, norm, scale and width; blocks without mixer or MLP."""
    arch = random_arch(Random(seed), "vit")
    (stage,) = arch.stages
    rest = {"tokens": None, "merge": "sparse", "token_scale": False}
    blocks = tuple(dataclasses.replace(b, **rest) for b in stage.blocks if not b.conv_kernel)
    return dataclasses.replace(arch, stages=(dataclasses.replace(stage, blocks=blocks or source(seed + 1).blocks),))


@pytest.mark.parametrize("seed", range(8))
def test_merging_nothing_changes_nothing(seed: int) -> None:
    arch = source(seed)
    model, x = random_model(arch, seed), random_images(arch, seed)
    with torch.no_grad():
        torch.testing.assert_close(apply_tome(model, 0)(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("r", [1, 3, (2, -1.0), [5, 1]])
def test_macs(seed: int, r: object) -> None:
    arch = source(seed)
    r = r[: arch.depth] if isinstance(r, list) else r
    tome = apply_tome(random_model(arch, seed, torch.float32), r)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        tome(random_images(arch, seed, batch=1, dtype=torch.float32))
    assert counter.get_total_flops() == 2 * tome_macs(arch, r)
    assert tome_macs(arch, 0) == cost(arch).macs


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_neither_lost_nor_made(seed: int) -> None:
    arch = source(seed)
    model = random_model(arch, seed)
    members = torch.eye(arch.tokens).expand(3, -1, -1)
    before = arch.tokens
    for step, block in zip(apply_tome(model, 4).steps(random_images(arch, seed)), arch.blocks, strict=True):
        after = step.x.shape[1]
        assert before - after == (min(4, (before - arch.prefix_tokens) // 2) if block.mixer == "attn" else 0)
        members = members if step.matching is None else step.matching.sum(members)
        assert torch.equal(members.sum(1), torch.ones(3, arch.tokens))
        assert torch.equal(members.sum(2), step.size[..., 0].float())
        prefix = torch.eye(arch.tokens)[: arch.prefix_tokens].expand(3, -1, -1)
        assert torch.equal(members[:, : arch.prefix_tokens], prefix)  # alone, in their order
        before = after


def test_equal_tokens_merge_without_loss() -> None:
    """With attention in proportion to size, a token counts as often as it was there; without it, it does not."""
    arch = planned(None, None, pool="avg", class_token=False)
    model = random_model(arch, 0)
    with torch.no_grad():
        model.pos_embed.zero_()
    x = torch.ones(1, arch.in_chans, *arch.img_size, dtype=torch.float64)
    x[..., -arch.patch_size[1] :] = -1  # a column of other patches
    tome = apply_tome(model, [3])
    with torch.no_grad():
        torch.testing.assert_close(tome(x), model(x), rtol=0, atol=1e-12)
        tome.proportional = False
        assert (tome(x) - model(x)).abs().max() > 1e-6


@pytest.mark.parametrize("n", [7, 10])
@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("r", [1, 2, 9])
def test_the_most_similar_pairs_are_matched(n: int, prefix: int, r: int) -> None:
    metric = torch.randn(1, n, 4, generator=torch.Generator().manual_seed(n + prefix), dtype=torch.float64)
    found = match(metric, r, prefix)
    best = {}
    for a in (a for a in range(0, n, 2) if a >= prefix):
        pairs = {b: torch.cosine_similarity(metric[0, a], metric[0, b], dim=0) for b in range(1, n, 2) if b >= prefix}
        best[a] = max(pairs, key=pairs.__getitem__), max(pairs.values())
    order = sorted(best, key=lambda a: -best[a][1])[: min(r, (n - prefix) // 2)]
    assert (2 * found.src[0]).tolist() == order
    assert (2 * found.dst[0] + 1).tolist() == [best[a][0] for a in order]
    assert sorted((2 * torch.cat([found.src, found.unm], 1)[0]).tolist()) == list(range(0, n, 2))


def test_a_stock_model_is_not_changed_and_r_may_be_set_later() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, num_classes=5, depth=2, init_values=0.5, qk_norm=True
    )
    model.eval()
    before, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    tome = apply_tome(model, 4)
    with torch.no_grad():
        merged = tome(x)
        assert torch.equal(model(x), before(x))
        assert (merged - model(x)).abs().max() > 1e-4
        tome.r = [0, 0]
        torch.testing.assert_close(tome(x), model(x), rtol=0, atol=1e-5)
    assert arch_of(model) == arch_of(before)
    assert {id(p) for p in tome.parameters()} == {id(p) for p in model.parameters()}


def test_schedules() -> None:
    assert tome_schedule(3, 4) == [4, 4, 4]
    assert tome_schedule(3, (4, -1.0)) == [8, 4, 0]
    assert tome_schedule(3, [7, 1]) == [7, 1, 0]
    assert tome_schedule(1, (4, 0.5)) == [2]
    for r, message in (
        ((4, 1.5), r"r = \(4, 1.5\): the inflection must lie in -1..1"),
        ([1, 2, 3, 4], "at most 3 numbers"),
        (-1, "of at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            tome_schedule(3, r)


def test_models_with_a_grid_are_refused() -> None:
    swin = random_arch(Random(0), "swin")
    with pytest.raises(UserError, match="of family 'swin'"):
        apply_tome(random_model(swin, 0), 1)
    arch = source(0)
    own = next(i for i, b in enumerate(arch.blocks) if b.mixer == "attn")
    for changes, message in (
        ({"tokens": arch.tokens}, "has a token plan"),
        ({"token_scale": True}, "has factors per token"),
        ({"mixer": "conv3x3", "heads": 0, "qk": 0, "v": 3, "scale": 0.0}, "mixer 'conv3x3' needs the grid"),
    ):
        blocks = list(arch.blocks)
        blocks[own] = dataclasses.replace(blocks[own], **changes)
        other = dataclasses.replace(arch, stages=(dataclasses.replace(arch.stages[0], blocks=tuple(blocks)),))
        with pytest.raises(UserError, match=rf"blocks\[{own}\] .*{message}"):
            apply_tome(random_model(other, 0), 1)
