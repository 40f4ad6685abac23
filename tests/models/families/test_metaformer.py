"""MetaFormer: the full record is the same function; streams, units, convolutions, heads and blocks are cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.models import metaformer
from timm.models._registry import _model_to_module
from torch import nn

from prunesweep.models import (
    Arch,
    BlockCut,
    Cut,
    Setting,
    UserError,
    adopted,
    arch_of,
    build,
    build_table,
    cost,
    cut,
    load,
    num_params,
    save,
)
from prunesweep.models.builder import resize
from prunesweep.models.families import family_of
from prunesweep.models.io.export import export
from prunesweep.models.latency.table import LatencyTable
from prunesweep.models.without_values import without_values
from prunesweep.pruners import upvit
from prunesweep.pruners.divergence import kl_divergence
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.subspaces import compress, equal_shares
from prunesweep.pruners.uvc.hook import UVC
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.generate import random_arch, random_images, random_model
from tests.models.test_counting import counted_macs
from tests.pruners.nvit.test_hook import GROUPS, ladder, train

ATTENTION = [metaformer.SepConv, metaformer.Attention]
KINDS: dict[str, dict[str, Any]] = {  # as timm's functions of these names make them
    "poolformer": {
        "downsample_norm": None,
        "mlp_act": nn.GELU,
        "mlp_bias": True,
        "norm_layers": metaformer.GroupNorm1,
        "layer_scale_init_values": 1e-5,
        "res_scale_init_values": None,
        "use_mlp_head": False,
    },
    "poolformerv2": {"norm_layers": metaformer.GroupNorm1NoBias, "use_mlp_head": False},
    "convformer": {"token_mixers": metaformer.SepConv},
    "caformer": {
        "token_mixers": ATTENTION,
        "norm_layers": [metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias],
    },
}


def small(kind: str, **options: Any) -> Any:
    """A narrow timm model of two stages, the second with factors on what passes by, with random weights."""
    shape = {"depths": (1, 2), "dims": (12, 64), "num_classes": 5, "res_scale_init_values": (None, 1.0)}
    model = metaformer.MetaFormer(**{**shape, **KINDS[kind], **options}).eval()
    model.pretrained_cfg = {"input_size": (3, 22, 35)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return model.double()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("poolformer", {}),
        ("poolformerv2", {}),
        ("convformer", {}),
        ("caformer", {}),
        ("caformer", {"num_classes": 0}),
        ("caformer", {"qkv_bias": True, "proj_bias": True, "head_dim": 16, "mlp_bias": True}),
    ],
)
def test_an_adopted_model_is_the_same_function(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = small(kind, **options)
    own: Any = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert Arch.from_json(arch.to_json()) == arch
    assert [stage.res_scale for stage in arch.stages] == [False, kind != "poolformer"]
    assert (cost(arch).params, cost(arch).macs) == (num_params(own), counted_macs(build(arch), arch))
    assert num_params(own) == num_params(model)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        scale = model.forward_features(x).abs().max().item()
        torch.testing.assert_close(own.forward_features(x), model.forward_features(x), rtol=0, atol=1e-12 * scale)
        assert torch.equal(load(save(own, tmp_path / "own"))(x), own(x))


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    names = sorted(
        {name.split(".")[0] for name in timm.list_pretrained() if _model_to_module[_bare(name)] == "metaformer"}
    )
    assert len(names) == 18
    for name in names:
        with without_values():
            theirs = timm.create_model(name)
            arch = Arch.from_timm(theirs)
        given = family_of(arch).adopted(theirs, arch)
        with without_values():
            own = build(arch).state_dict()
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}, name
        assert cost(arch).params == num_params(theirs)


def _bare(name: str) -> str:
    return name.split(".")[0]


def test_masked_mean_and_variance_of_a_group_norm_follow_the_cut() -> None:
    """One block, one channel gone: the norm of the cut model averages over the places of the others alone."""
    model: Any = adopted(small("poolformerv2", depths=(1,), dims=(6,), res_scale_init_values=(None,)))
    narrow: Any = cut(model, Cut(embed=((0, 1, 2, 4, 5),), blocks=(BlockCut(),)))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    left = x[..., [0, 1, 2, 4, 5]]
    whole, own = model.stages[0].blocks[0].norm1, narrow.stages[0].blocks[0].norm1
    mean, variance = left.mean((1, 2), keepdim=True), left.var((1, 2), keepdim=True, correction=0)
    wanted = (left - mean) / (variance + whole.eps).sqrt() * whole.weight[[0, 1, 2, 4, 5]]
    torch.testing.assert_close(own(left), wanted)
    assert not torch.allclose(whole(x)[..., [0, 1, 2, 4, 5]], wanted)


def test_a_unit_takes_the_bias_of_its_activation_with_it() -> None:
    """StarReLU gives its bias where a unit's input is 0; the unit's weights behind it go, so it counts no more."""
    model: Any = adopted(small("convformer", depths=(1,), dims=(8,), res_scale_init_values=(1.0,)))
    block = model.stages[0].blocks[0]
    kept, hidden = tuple(range(0, 16, 3)), tuple(range(1, 32, 5))
    narrow: Any = cut(model, Cut(blocks=(BlockCut(v=(kept,), mlp=hidden),)))
    assert (arch_of(narrow).blocks[0].v, arch_of(narrow).blocks[0].mlp) == (len(kept), len(hidden))
    x = random_images(arch_of(model), 3)
    with torch.no_grad():
        before = narrow(x)
        assert block.attn.act1.bias.item() != 0
        block.attn.pwconv2.weight[:, [i for i in range(16) if i not in kept]] = 0
        block.mlp.fc2.weight[:, [i for i in range(32) if i not in hidden]] = 0
        torch.testing.assert_close(before, model(x), rtol=0, atol=1e-10)


def test_halves_leave_their_factors_and_blocks_take_them() -> None:
    model: Any = adopted(small("caformer"))
    x = random_images(arch_of(model), 3)
    parts = {"mixer": BlockCut(mixer="none"), "mlp": BlockCut(mlp=()), "block": BlockCut(keep=False)}
    outputs, expected = {}, {}
    second = model.stages[1].blocks[0]
    with torch.no_grad():
        for part, choice in parts.items():
            narrow = cut(model, Cut(blocks=(BlockCut(), choice, BlockCut())))
            assert num_params(narrow) == cost(arch_of(narrow)).params
            outputs[part] = narrow(x)
        for part, layer in (("mixer", second.attn.proj), ("mlp", second.mlp.fc2)):
            weight = layer.weight.clone()
            layer.weight.zero_()
            expected[part] = model(x)
            layer.weight.copy_(weight)
        del model.stages[1].blocks[0]
        expected["block"] = model(x)
    for part, wanted in expected.items():
        torch.testing.assert_close(outputs[part], wanted, rtol=0, atol=1e-10, msg=part)


def test_other_sizes_features_and_classifiers(tmp_path: Path) -> None:
    whole: Any = adopted(small("caformer").float())
    model: Any = cut(whole, Cut(embed=(tuple(range(8)), tuple(range(0, 64, 2))), blocks=(BlockCut(),) * 3))
    assert resize(model, (34, 18)).stages[1].grid == (4, 2)
    assert model(random_images(arch_of(model), 1, dtype=torch.float32)).shape == (3, 5)
    path = save(model, tmp_path / "model")
    maps: Any = timm.create_model(f"local-dir:{path}", pretrained=True, features_only=True)
    assert [tuple(one.shape) for one in maps(torch.randn(2, 3, 34, 18))] == [(2, 8, 8, 4), (2, 32, 4, 2)]
    given: Any = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=7)
    model.reset_classifier(7)
    for other in (given, model):
        now = arch_of(other)
        assert (now.num_classes, now.head_mlp, num_params(other)) == (7, 256, cost(now).params)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 34, 18)).shape == (2, 32)
    assert cost(arch_of(model)).params == num_params(model)
    with pytest.raises(UserError, match="global_pool = 'max'"):
        model.reset_classifier(7, "max")


@pytest.mark.slow
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    arch = dataclasses.replace(random_arch(Random(2), "metaformer", missing=False), head_mlp=3)
    assert export(random_model(arch, 3, torch.float32), tmp_path / "small.onnx", "onnx") < 1e-5


def test_latency_tables_have_every_mixer(tmp_path: Path) -> None:
    arch = random_arch(Random(7), "metaformer", ragged=False, missing=False, extras=False)
    assert {block.mixer for block in arch.blocks} == {"sepconv", "attn", "pool"}
    build_table(arch, Setting(batch=1, threads=1), points=2, repeats=1, min_seconds=0.0).save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").predict(arch) > 0
    xcit = random_arch(Random(0), "xcit", ragged=False, missing=False, extras=False)
    build_table(xcit, Setting(batch=1, threads=1), points=2, repeats=1, min_seconds=0.0).save(tmp_path / "other.json")
    assert LatencyTable.load(tmp_path / "other.json").predict(xcit) > 0
    other = dataclasses.replace(arch.stages[0], res_scale=not arch.stages[0].res_scale)
    with pytest.raises(UserError, match=r"stages\[0\].res_scale = "):
        LatencyTable.load(tmp_path / "table.json").predict(dataclasses.replace(arch, stages=(other, *arch.stages[1:])))


@pytest.mark.parametrize(("seed", "norm"), [(10, "group"), (5, "layer")])
def test_what_is_pruned_while_it_trains_is_the_masked_model(seed: int, norm: str) -> None:
    arch = random_arch(Random(seed), "metaformer", ragged=False, missing=False, extras=False)
    assert arch.norm == norm
    model, x = random_model(arch, seed), random_images(arch, 1000)
    hook = NViTPruning(ladder(arch, 0.3), groups=GROUPS, interval=2, groups_per_step=4, exact=False)
    hook.wrap(model)
    for _ in train(model, hook):
        pass
    (snapshot,) = hook.snapshots
    narrow = arch_of(snapshot.model)
    assert any(own.mixer == "sepconv" and own.v < arch.blocks[own.src].v for own in narrow.blocks)
    assert narrow.stages[0].width < arch.stages[0].width
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), snapshot.model.eval()(x), rtol=0, atol=1e-9)


def test_blocks_are_scored_by_leaving_them_out() -> None:
    arch = arch_of(adopted(small("caformer", depths=(1, 3), res_scale_init_values=(None, 1.0))))
    model, x = random_model(arch, 0), random_images(arch, 0)
    depth = upvit.score_depth(model, [(x, torch.zeros(len(x)))]).vectors["depth"]
    without = [cut(model, Cut(blocks=tuple(BlockCut(keep=i != own) for own in range(4)))) for i in range(1, 4)]
    with torch.no_grad():
        found = [kl_divergence(model(x), one(x)).sum().item() for one in without]
    assert depth.isinf().tolist()[0]
    assert depth[1:].argmin().item() == min(range(3), key=found.__getitem__)
    assert depth.min().item() == pytest.approx(min(found))


def test_what_its_mixers_do_not_allow() -> None:
    arch = random_arch(Random(7), "metaformer", ragged=False, missing=False, extras=False)
    model, x = random_model(arch, 0), random_images(arch, 0)
    with pytest.raises(UserError, match="UVC prunes families .*; it has 'local_mixers': it gates heads"):
        UVC(UVCSettings(budgets=(0.5,))).wrap(model)
    with pytest.raises(UserError, match="it has 'local_mixers'"):
        upvit.score(model, [(x, torch.zeros(len(x), dtype=torch.long))])
    with pytest.raises(
        UserError, match="subspaces are computed for .* it lacks 'streams': factors multiply single channels"
    ):
        compress(model, equal_shares(arch, 0.5), [x])
    for choice, message in (
        (BlockCut(qk=((0,),), v=((0,),)), "a convolution takes v alone"),
        (BlockCut(mixer="conv3x3"), "convolutions come from attention of"),
    ):
        with pytest.raises(UserError, match=message):
            cut(model, Cut(blocks=(choice, *[BlockCut()] * (arch.depth - 1))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": (2, 2), "img_size": (4, 4)}, r"patch_size = \[2, 2\]: the first convolution"),
        ({"act": "star"}, "act = 'star': must be one of .*star_relu"),
        ({"norm": "rms"}, "norm = 'rms': must be one of layer, group"),
        ({"norm": "batch"}, "norm = 'batch': must be one of layer, rms, group"),
        ({"head_mlp": -1}, "head_mlp = -1"),
        ({"head_norm": "tokens"}, "needs head_norm = 'pooled'"),
        ({"family": "pvt_v2"}, "family = 'pvt_v2': needs"),
        ({"family": "vit"}, "needs embed_norm = False"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    arch = random_arch(Random(7), "metaformer", ragged=False, missing=False, extras=False)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(arch, **fields).validate()


def test_mixers_and_factors_are_this_family_s_alone() -> None:
    arch = random_arch(Random(7), "pvt_v2", ragged=False, missing=False, extras=False)
    stage = arch.stages[0]
    pool = dataclasses.replace(stage.blocks[0], mixer="pool", heads=0, qk=0, v=0, scale=0.0, sr=0)
    for changed, message in (
        (dataclasses.replace(stage, blocks=(pool, *stage.blocks[1:])), "mixer = 'pool': is for family 'metaformer'"),
        (dataclasses.replace(stage, res_scale=True), "res_scale: is for family 'metaformer'"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(arch, stages=(changed, *arch.stages[1:])).validate()


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("poolformer", {"token_mixers": nn.Identity}, "mixes places by a Identity"),
        ("poolformer", {"pool_size": 5}, "averages over another square than 3x3"),
        ("convformer", {"kernel_size": 5, "padding": 2}, "separable convolution with other layers"),
        ("convformer", {"dims": (12, 12)}, "as wide as the last"),
        ("convformer", {"global_pool": "max"}, "its pooling is 'max', not 'avg'"),
        ("convformer", {"output_norm": metaformer.GroupNorm1}, "its last norm is no LayerNorm"),
        ("convformer", {"layer_scale_init_values": (1.0, None)}, "its blocks differ in norms, activation"),
        ("convformer", {"downsample_norm": metaformer.LayerNorm2d}, "no LayerNorm without bias"),
    ],
)
def test_models_of_other_parts_are_refused(kind: str, options: dict[str, Any], reason: str) -> None:
    shape = {"depths": (1, 1), "dims": (12, 16), "res_scale_init_values": None}
    with without_values():
        model = metaformer.MetaFormer(**{**KINDS[kind], **shape, **options})
    with pytest.raises(UserError, match=reason):
        Arch.from_timm(model)
