"""Differential attention: the full record is the same function; heads, pairs and values go, and halves side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.layers import DiffAttention

from prunesweep.models import (
    Arch,
    BlockCut,
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
from prunesweep.models.fuse import for_inference
from prunesweep.models.latency.building import macs_table
from prunesweep.models.tome import apply_tome
from prunesweep.models.without_values import without_values
from prunesweep.pruners import upvit
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.subspaces import compress, equal_shares
from prunesweep.pruners.uvc.hook import UVC
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.generate import random_arch, random_images, random_model
from tests.models.test_counting import counted_macs
from tests.oracle import masked
from tests.pruners.nvit.test_hook import GROUPS, ladder, train

DIFFERS, BESIDE, BOTH = (f"vit_{kind}_patch16_reg1_gap_256" for kind in ("dwee", "pwee", "dpwee"))


def small(name: str = DIFFERS, **options: Any) -> Any:
    """A narrow timm model with random norms, biases, scales and lambdas."""
    shape = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **{**shape, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.double()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (DIFFERS, {}),
        (DIFFERS, {"img_size": (32, 48), "num_classes": 0, "class_token": True, "global_pool": "token"}),
        (DIFFERS, {"qkv_bias": False, "init_values": None}),
        (BOTH, {}),
        (BOTH, {"qkv_bias": False, "num_classes": 0}),
        (BESIDE, {}),
        (BESIDE, {"qkv_bias": False, "qk_norm": True, "reg_tokens": 0}),
    ],
)
def test_an_adopted_model_is_the_same_function(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = small(name, **options)
    own = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert Arch.from_json(arch.to_json()) == arch
    assert (arch.differential, arch.parallel) == (name != BESIDE, name != DIFFERS)
    assert (cost(arch).params, cost(arch).macs) == (num_params(own), counted_macs(build(arch), arch))
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(for_inference(own)(x), model(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(load(save(own, tmp_path / "own"))(x), own(x))


def test_a_lambda_of_two_numbers_is_the_same_function() -> None:
    model = small()
    for i, block in enumerate(model.blocks):
        block.attn = DiffAttention(24, 3, qkv_bias=True, depth=i, dual_lambda=True).double()
        torch.nn.init.constant_(block.attn.lambda_a, 0.3)
    x = random_images(Arch.from_timm(model), 1)
    with torch.no_grad():
        torch.testing.assert_close(adopted(model)(x), model(x), rtol=1e-12, atol=1e-12)


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_pretrained()}
    kinds = [kind for kind in ("dlittle", "dpwee", "dwee", "pwee") if f"vit_{kind}_patch16_reg1_gap_256" in found]
    assert len(kinds) == 4
    for name in (f"vit_{kind}_patch16_reg1_gap_256" for kind in kinds):
        with without_values():
            model = timm.create_model(name, depth=2)
            arch = Arch.from_timm(model)
            own, given = build(arch).state_dict(), family_of(arch).adopted(model, arch)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}, name


@pytest.mark.parametrize("name", [DIFFERS, BOTH])
def test_heads_pairs_and_values_go(name: str) -> None:
    model: Any = adopted(small(name))
    heads = BlockCut(qk=((0, 2), (9, 10)), v=((1, 5, 7), (18,)), mlp=(0, 9))
    decision = Cut(embed=(tuple(range(0, 24, 2)),), blocks=(heads, BlockCut(), BlockCut(keep=False)))
    narrow: Any = cut(model, decision)
    before, after = model.blocks[0].attn, narrow.blocks[0].attn
    assert torch.equal(after.q_proj.weight, before.q_proj.weight[[0, 2, 9, 10, 12, 14, 21, 22]][:, ::2])
    assert torch.equal(after.norm.weight, before.norm.weight[[1, 5, 7, 18]])
    assert torch.equal(after.lambda_full, before.lambda_full)
    x = random_images(arch_of(model), 1)
    assert (cost(arch_of(narrow)).params, cost(arch_of(narrow)).macs) == (
        num_params(narrow),
        counted_macs(build(arch_of(narrow)), arch_of(narrow)),
    )
    with torch.no_grad(), masked(model, decision):
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-10)
    mixed = BlockCut(qk=((0, 9), (8, 9)), v=((0,), (16,)))
    with pytest.raises(UserError, match="a norm is over the values of one head; keep channels of one"):
        cut(model, Cut(blocks=(mixed, BlockCut(), BlockCut())))


def test_what_is_pruned_while_it_trains_is_the_masked_model() -> None:
    arch = random_arch(Random(3), "diff", ragged=False, missing=False, extras=False)
    model, x = random_model(arch, 0), random_images(arch, 1000)
    hook = NViTPruning(ladder(arch, 0.5), groups=GROUPS, interval=2, groups_per_step=4, exact=False)
    hook.wrap(model)
    for _ in train(model, hook):
        if hook.snapshots:
            with torch.no_grad():
                torch.testing.assert_close(model(x), hook.snapshots[0].model(x), rtol=0, atol=1e-9)
    (snapshot,) = hook.snapshots
    (narrow,), (whole,) = arch_of(snapshot.model).blocks, arch.blocks
    assert narrow.v < whole.v
    assert narrow.qk < whole.qk


def test_a_narrower_model_is_refitted() -> None:
    model: Any = adopted(small())
    arch = arch_of(model)
    batches = [random_images(arch, 100 + n, 16) for n in range(4)]
    x = random_images(arch, 7, 16)
    same = compress(model, equal_shares(arch, 1.0), batches)
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=1e-7)
        narrow = compress(model, equal_shares(arch, 0.6), batches)
        chosen = compress(model, equal_shares(arch, 0.6), batches, refit=False)
        error, without = (((one(x) - model(x)) ** 2).mean() for one in (narrow, chosen))
    found = arch_of(narrow).stages[0]
    assert found.width < 24
    assert all(block.qk < 4 and block.v == 8 for block in found.blocks)  # a head's values stay: a norm acts on them
    assert error < without


def test_tokens_are_merged_by_similarity() -> None:
    model: Any = adopted(small(img_size=64))
    x = random_images(arch_of(model), 1)
    with torch.no_grad():
        torch.testing.assert_close(apply_tome(model, 0)(x), model(x), rtol=0, atol=1e-12)
        assert torch.isfinite(apply_tome(model, 3)(x)).all()


@pytest.mark.parametrize("family", ["diff", "eva"])
def test_what_halves_side_by_side_do_not_allow(family: str) -> None:
    model: Any = adopted(small(BOTH if family == "diff" else BESIDE))
    arch, x = arch_of(model), random_images(arch_of(model), 0)
    assert arch.family == family
    with pytest.raises(UserError, match="halves of blocks are fitted one after the other"):
        compress(model, equal_shares(arch, 0.5), [x])
    reason = "it has 'difference_maps'" if family == "diff" else "its MLPs read what attention reads"
    with pytest.raises(UserError, match=reason):
        upvit.score(model, [(x, torch.zeros(len(x), dtype=torch.long))])
    tome = "MLPs of .* read what attention reads" if family == "diff" else "turned by the places"
    with pytest.raises(UserError, match=tome):
        apply_tome(model, 1)


def test_widths_of_halves_side_by_side_are_decided_while_it_trains() -> None:
    model: Any = adopted(small(BESIDE))
    hook = UVC(UVCSettings(budgets=(0.5,), warmup_epochs=0))
    hook.wrap(model)
    for block in model.blocks:
        block.v_keep[:8] = False
        block.mlp_keep[::2] = False
    x = random_images(hook.arch, 0)
    with torch.no_grad():
        gated = model.eval()(x)
        kept = (tuple(range(8, 16)), tuple(range(16, 24)))
        own = [BlockCut(qk=kept, v=kept, mlp=tuple(range(1, 120, 2)))]
        narrow = cut(adopted(small(BESIDE)), Cut(blocks=tuple(own * 3)))
        torch.testing.assert_close(narrow(x), gated, rtol=0, atol=1e-10)
    with pytest.raises(UserError, match="it has 'difference_maps': value channels that its gates close still count"):
        UVC(UVCSettings(budgets=(0.5,))).wrap(adopted(small()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"differential": False}, "family = 'diff': needs differential = True"),
        ({"qk_norm": True}, "family = 'diff': needs qk_norm = False"),
        ({"family": "eva"}, "family = 'eva': needs differential = False"),
        ({"family": "vit", "parallel": True, "differential": False, "k_bias": True}, "family = 'vit': needs"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    arch = random_arch(Random(1), "diff", ragged=False, missing=False, extras=False)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(arch, **fields).validate()


def test_latency_is_predicted_and_other_sizes_are_taken() -> None:
    for name in (DIFFERS, BOTH):
        model: Any = adopted(small(name))
        arch = arch_of(model)
        assert macs_table(arch, ms_per_gmac=1.0).predict(arch) == pytest.approx(cost(arch).macs / 1e9)
        model.set_input_size((48, 32))
        assert arch_of(model).stages[0].grid == (3, 2)
        assert model(random_images(arch_of(model), 1)).shape == (3, 5)


def test_other_forms_are_refused() -> None:
    model = small()
    model.blocks[1] = timm.create_model("vit_wee_patch16_reg1_gap_256", embed_dim=24, num_heads=3, depth=1).blocks[0]
    with pytest.raises(UserError, match="block 1 has a Attention, others differential attention"):
        Arch.from_timm(model)
    with pytest.raises(UserError, match="block 0 normalises queries and keys"):
        Arch.from_timm(small(qk_norm=True))
