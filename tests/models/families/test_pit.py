"""PiT: the full record is the same function; a channel whose source has gone begins with a bias, and sizes change."""

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
from prunesweep.models.io.export import export
from prunesweep.models.latency.building import macs_table
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


def small(name: str = "pit_ti_224", **options: Any) -> Any:
    """A narrow timm model with random norms, biases, tokens and positions."""
    shape = {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 2, 1), "num_classes": 5}
    model = timm.create_model(name, **{**shape, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.double()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pit_ti_224", {}),
        ("pit_b_224", {"img_size": (70, 84)}),
        ("pit_s_distilled_224", {}),
        ("pit_xs_224", {"num_classes": 0}),
        ("pit_xs_224", {"base_dims": (8, 12), "depth": (1, 1), "heads": (2, 4), "img_size": (32, 40)}),
        ("pit_ti_distilled_224", {"in_chans": 1, "mlp_ratio": 2}),
    ],
)
def test_an_adopted_model_is_the_same_function(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = small(name, **options)
    own = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert Arch.from_json(arch.to_json()) == arch
    assert arch.dist_token == ("distilled" in name)
    assert (cost(arch).params, cost(arch).macs) == (num_params(model), counted_macs(build(arch), arch))
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(load(save(own, tmp_path / "own"))(x), own(x))


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_pretrained()}
    names = sorted(name for name in found if _model_to_module[name] == "pit")
    for name in names:
        with without_values():
            model = timm.create_model(name)
            arch = Arch.from_timm(model)
            own, given = build(arch).state_dict(), family_of(arch).adopted(model, arch)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}, name
    assert len(names) == 8


def test_a_channel_whose_source_has_gone_begins_with_a_bias() -> None:
    model: Any = adopted(small("pit_ti_distilled_224"))
    kept = (1, 2, 6, 7, 11)
    heads = BlockCut(qk=((0, 3), (12, 13)), v=((0,), (9, 15)), mlp=(0, 9))
    embed = (kept, tuple(range(0, 32, 3)), None)
    decision = Cut(embed=embed, blocks=(heads, BlockCut(), BlockCut(keep=False), BlockCut()))
    narrow: Any = cut(model, decision)
    select = narrow.transformers[1].pool.select  # channel 3 of the stage came from 1, 6 from 3, which has gone
    assert select.shape == (11, 5)
    assert [kept[row.argmax()] if row.any() else None for row in select[:3]] == [None, 1, None]
    arch, x = arch_of(narrow), random_images(arch_of(model), 1)
    assert (cost(arch).params, cost(arch).macs) == (num_params(narrow), counted_macs(build(arch), arch))
    with torch.no_grad(), masked(model, decision):
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-10)


def test_what_is_pruned_while_it_trains_is_the_masked_model() -> None:
    arch = random_arch(Random(4), "pit", ragged=False, missing=False, extras=False)
    assert len(arch.stages) > 1
    model, x = random_model(arch, 0), random_images(arch, 1000)
    hook = NViTPruning(ladder(arch, 0.5), groups=GROUPS, interval=2, groups_per_step=4, exact=False)
    hook.wrap(model)
    for _ in train(model, hook):
        if hook.snapshots:
            with torch.no_grad():
                torch.testing.assert_close(model.eval()(x), hook.snapshots[0].model.eval()(x), rtol=0, atol=1e-9)
    (snapshot,) = hook.snapshots
    assert [s.width for s in arch_of(snapshot.model).stages] != [s.width for s in arch.stages]


def test_blocks_behind_gates_are_left_out() -> None:
    model: Any = adopted(small())
    hook = UVC(UVCSettings(budgets=(0.7,)))
    hook.wrap(model)
    model.transformers[1].blocks[0].runs.fill_(False)
    x = random_images(hook.arch, 0)
    blocks = (BlockCut(), BlockCut(keep=False), BlockCut(), BlockCut())
    with torch.no_grad():
        torch.testing.assert_close(cut(adopted(small()), Cut(blocks=blocks))(x), model.eval()(x), rtol=0, atol=1e-12)


def test_what_convolutions_of_single_channels_do_not_allow() -> None:
    model: Any = adopted(small())
    arch, x = arch_of(model), random_images(arch_of(model), 0)
    with pytest.raises(UserError, match="it has 'single_channels': its own passes, .* read a stage by linear layers"):
        upvit.score(model, [(x, torch.zeros(len(x), dtype=torch.long))])
    with pytest.raises(UserError, match="subspaces are computed for"):
        compress(model, equal_shares(arch, 0.5), [x])
    depth = upvit.score_depth(model, [(x, torch.zeros(len(x)))]).vectors["depth"]
    assert depth.isinf().tolist().count(True) == 3  # a block of every stage stays


def test_other_sizes_latency_features_and_export(tmp_path: Path) -> None:
    model: Any = adopted(small("pit_ti_distilled_224"))
    arch = arch_of(model)
    assert macs_table(arch, ms_per_gmac=1.0).predict(arch) == pytest.approx(cost(arch).macs / 1e9)
    save(model, tmp_path / "own")
    maps = timm.create_model(f"local-dir:{tmp_path}/own", pretrained=True, features_only=True).double()
    x = random_images(arch, 1)
    assert [m.shape[1:] for m in maps(x)] == [(16, 7, 7), (32, 4, 4), (64, 2, 2)]
    larger = timm.create_model(f"local-dir:{tmp_path}/own", pretrained=True, img_size=(80, 96)).double().eval()
    now = arch_of(larger)
    assert [stage.grid for stage in now.stages] == [(9, 11), (5, 6), (3, 3)]
    with torch.no_grad():
        assert larger(random_images(now, 1)).shape == (3, 5)
    assert export(model.float(), tmp_path / "standalone", "standalone") < 1e-5
    with pytest.raises(UserError, match="dynamic_img_size = True"):
        family_of(arch).make_dynamic(model, arch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_token": False}, "family = 'pit': needs class_token = True"),
        ({"patch_size": (8, 4)}, "the patches of pit have one stride"),
        ({"img_size": (8, 64)}, "must be at least twice patch_size"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(Arch.from_timm(small()), **fields).validate()


def test_other_forms_of_timm_s_models_are_refused() -> None:
    with pytest.raises(UserError, match="its patches are not twice as wide as they are apart"):
        Arch.from_timm(small(stride=16))
    with pytest.raises(UserError, match="its pooling is '', not 'token'"):
        Arch.from_timm(small(global_pool=""))
