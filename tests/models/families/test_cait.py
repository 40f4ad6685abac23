"""CaiT: the full record is the same function, heads go with their place in the mixings, and what they do not allow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.models._registry import _model_to_module

from prunesweep.models import (
    Arch,
    BlockCut,
    ClassAttention,
    Cut,
    UserError,
    adopted,
    arch_of,
    build,
    cost,
    cut,
    load,
    num_params,
    save,
)
from prunesweep.models.families import family_of
from prunesweep.models.latency.building import macs_table
from prunesweep.models.tome import apply_tome
from prunesweep.models.without_values import without_values
from prunesweep.pruners import kl_divergence, upvit
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.subspaces import compress, equal_shares
from tests.generate import random_arch, random_images, random_model
from tests.models.test_counting import counted_macs
from tests.oracle import masked
from tests.pruners.nvit.test_hook import GROUPS, ladder, train


def small(**options: Any) -> Any:
    """A narrow timm model with random norms, biases, scales and mixings."""
    shape = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("cait_xxs24_224", **{**shape, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": (32, 48), "num_classes": 0},
        {"qkv_bias": False, "depth_token_only": 1, "mlp_ratio_token_only": 2},
    ],
)
def test_an_adopted_model_is_the_same_function(options: dict[str, Any], tmp_path: Path) -> None:
    model = small(**options)
    own = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert Arch.from_json(arch.to_json()) == arch
    assert cost(arch).params == num_params(own)
    assert cost(arch).macs == counted_macs(build(arch), arch)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(load(save(own, tmp_path / "own"))(x), own(x))
    scales = 2 * 24 * len(model.blocks_token_only)  # which are in the layers in front of them
    assert num_params(model) - num_params(own) == scales


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_pretrained()}
    names = sorted(name for name in found if _model_to_module[name] == "cait")
    for name in names:
        with without_values():
            model = timm.create_model(name, depth=2)
            arch = Arch.from_timm(model)
            own, given = build(arch).state_dict(), family_of(arch).adopted(model, arch)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}, name
    assert len(names) == 10


def test_a_head_goes_with_its_row_and_column_of_both_mixings() -> None:
    model: Any = adopted(small())
    kept = (range(8), range(16, 24))
    heads = BlockCut(qk=tuple(map(tuple, kept)), v=tuple(map(tuple, kept)))
    decision = Cut(embed=(tuple(range(0, 24, 2)),), blocks=(heads, BlockCut(), BlockCut(keep=False)))
    narrow: Any = cut(model, decision)
    for mix in ("proj_l", "proj_w"):
        before, after = (getattr(one.blocks[0].attn, mix) for one in (model, narrow))
        assert torch.equal(after.weight, before.weight[[0, 2]][:, [0, 2]])
        assert torch.equal(after.bias, before.bias[[0, 2]])
    assert narrow.attn_pool.blocks[0].attn.q.weight.shape == (24, 12)
    x = random_images(arch_of(model), 1)
    with torch.no_grad(), masked(model, decision):
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-10)
    mixed = BlockCut(qk=((0, 9), (16, 17)), v=((0,), (16,)))
    with pytest.raises(UserError, match="a head has a place of its own in the mixing of heads; keep channels of one"):
        cut(model, Cut(blocks=(mixed, BlockCut(), BlockCut())))


def test_what_is_pruned_while_it_trains_is_the_masked_model() -> None:
    arch = random_arch(Random(0), "cait", ragged=False, missing=False, extras=False)
    model, x = random_model(arch, 0), random_images(arch, 1000)
    hook = NViTPruning(ladder(arch, 0.5), groups=GROUPS, interval=2, groups_per_step=4, exact=False)
    hook.wrap(model)
    for _ in train(model, hook):
        if hook.snapshots:
            with torch.no_grad():
                torch.testing.assert_close(model(x), hook.snapshots[0].model(x), rtol=0, atol=1e-9)
    assert hook.snapshots


def test_a_narrower_stream_is_refitted_through_class_attention() -> None:
    """A projection loses nothing where the stream lies in a subspace; where it does not, refitting helps."""
    model: Any = adopted(small(img_size=32))
    arch = arch_of(model)
    batches = [random_images(arch, 100 + n, 16) for n in range(4)]
    same = compress(model, equal_shares(arch, 1.0), batches)
    x = random_images(arch, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=1e-7)
        narrow = compress(model, equal_shares(arch, 0.6), batches)
        chosen = compress(model, equal_shares(arch, 0.6), batches, refit=False)
        error, without = (((one(x) - model(x)) ** 2).mean() for one in (narrow, chosen))
    assert arch_of(narrow).stages[0].width < 24
    assert arch_of(narrow).class_attention == arch.class_attention
    assert error < without


def test_methods_that_heads_that_are_mixed_do_not_allow() -> None:
    arch = random_arch(Random(1), "cait", ragged=False, missing=False, extras=False)
    model, x = random_model(arch, 0), random_images(arch, 0)
    with pytest.raises(UserError, match="it has 'mixed_maps'"):
        upvit.score(model, [(x, torch.zeros(len(x), dtype=torch.long))])
    with pytest.raises(UserError, match="ToMe: random is of family 'cait', whose heads' logits are mixed"):
        apply_tome(model, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_attention": None}, "pool = 'map': needs class_attention"),
        ({"pool": "avg"}, "pool = 'avg': leaves no room for class_attention"),
        ({"pool": "token"}, "pool = 'token': must be one of map, avg"),
        ({"class_token": True}, "family = 'cait': needs class_token = False"),
        ({"class_attention": ClassAttention(blocks=0, width=4, heads=2, mlp=3)}, "class_attention.blocks = 0"),
        ({"class_attention": ClassAttention(blocks=1, width=5, heads=2, mlp=3)}, "width = 5: must be a multiple"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    arch = random_arch(Random(1), "cait", ragged=False, missing=False, extras=False)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(arch, **fields).validate()


def test_other_forms_of_timm_s_models_are_refused() -> None:
    for options, message in (
        ({"global_pool": "avg"}, "its pooling is 'avg', not 'token'"),
        ({"depth_token_only": 0}, "its blocks of the class token differ, or there are none"),
    ):
        with pytest.raises(UserError, match=message):
            Arch.from_timm(timm.create_model("cait_xxs24_224", img_size=32, embed_dim=24, depth=1, **options))


def test_latency_is_predicted_and_other_sizes_are_taken() -> None:
    model: Any = adopted(small())
    arch = arch_of(model)
    assert macs_table(arch, ms_per_gmac=1.0).predict(arch) == pytest.approx(cost(arch).macs / 1e9)
    model.set_input_size((48, 32))
    assert arch_of(model).stages[0].grid == (3, 2)
    model.reset_classifier(7, "avg")
    now = arch_of(model)
    assert (now.pool, now.class_attention, now.num_classes) == ("avg", None, 7)
    assert cost(now).params == num_params(model)


@pytest.mark.parametrize("family", ["cait", "xcit"])
def test_blocks_are_scored_by_leaving_them_out(family: str) -> None:
    archs = (random_arch(Random(seed), family, missing=False, extras=False) for seed in range(20))
    arch = next(arch for arch in archs if arch.depth == 3)
    model, x = random_model(arch, 0), random_images(arch, 0)
    depth = upvit.score_depth(model, [(x, torch.zeros(len(x)))]).vectors["depth"]
    without = [cut(model, Cut(blocks=tuple(BlockCut(keep=i != own) for own in range(3)))) for i in range(3)]
    with torch.no_grad():
        found = [kl_divergence(model(x), one(x)).sum().item() for one in without]
    assert depth.isinf().sum() == 1
    assert depth.argmin().item() == min(range(3), key=found.__getitem__)
    assert depth.min().item() == pytest.approx(min(found))
