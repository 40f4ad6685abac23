"""Hiera: the full record is the same function; what leads to a stage stays whole but for the streams at its ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from timm.models._registry import _model_to_module

from prunesweep.models import (
    Arch,
    BlockCut,
    Cut,
    QueryPool,
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
from prunesweep.models.without_values import without_values
from prunesweep.pruners import upvit
from prunesweep.pruners.nvit import saliency
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.subspaces import compress, equal_shares
from prunesweep.pruners.uvc.hook import UVC
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.generate import random_images
from tests.models.test_counting import counted_macs
from tests.pruners.nvit.test_hook import GROUPS, ladder, train

PYRAMID = {"img_size": 64, "embed_dim": 8, "stages": (1, 2, 3, 2), "num_classes": 5}


SAM = {"embed_dim": 8, "stages": (1, 2, 3, 2), "global_att_blocks": (5,), "window_spec": (8, 4, 2, 1)}


def made(name: str, **options: Any) -> Any:
    """A narrow timm model; one of SAM 2 takes images of any size, so that they are told in its ``pretrained_cfg``."""
    if name.startswith("hiera_"):
        return timm.create_model(name, **{**PYRAMID, **options})
    size = options.pop("img_size", (64, 128))
    return timm.create_model(name, pretrained_cfg_overlay={"input_size": (3, *size)}, **{**SAM, **options})


def small(name: str = "hiera_tiny_224", **options: Any) -> Any:
    """The same with random norms, biases, factors and positions."""
    model = made(name, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + (tensor.ndim == 1))
    return model.double()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hiera_tiny_224", {}),
        ("hiera_base_plus_224", {"img_size": (64, 96), "embed_dim": 12, "num_classes": 0}),
        ("hiera_small_abswin_256", {"img_size": 96}),  # no projections, positions of a window and of a coarse grid
        ("hiera_base_abswin_256", {"stages": (1, 1, 1, 1)}),
        ("hiera_tiny_224", {"mask_unit_size": (4, 4), "mask_unit_attn": (True, True, False, False)}),
        (
            "hiera_tiny_224",
            {"stages": (2, 1), "q_pool": 1, "mask_unit_size": (2, 2), "mask_unit_attn": (False, True), "img_size": 24},
        ),
        ("sam2_hiera_tiny", {}),
        ("sam2_hiera_base_plus", {"window_spec": (8, 4, 4, 2), "embed_dim": 12, "img_size": (128, 128)}),
        ("hieradet_small", {"num_classes": 5, "img_size": (64, 64), "window_spec": (8, 4, 4, 2)}),  # layer scale
    ],
)
def test_an_adopted_model_is_the_same_function(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = small(name, **options)
    own: Any = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert Arch.from_json(arch.to_json()) == arch
    assert (cost(arch).params, cost(arch).macs) == (num_params(own), counted_macs(build(arch), arch))
    assert (num_params(model) == num_params(own)) == (name in ("hiera_tiny_224", "hiera_base_plus_224"))
    assert sum(block.whole_map for block in arch.blocks) == (name.startswith("sam2"))
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(load(save(own, tmp_path / "own"))(x), own(x))
        assert len(model.feature_info) == len(own.feature_info)
        for mine, theirs in zip(own.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_pretrained()}
    names = sorted(name for name in found if _model_to_module[name] in ("hiera", "hieradet_sam2"))
    for name in names:
        with without_values():
            theirs = timm.create_model(name)
            arch = Arch.from_timm(theirs)
            own, given = build(arch).state_dict(), family_of(arch).adopted(theirs, arch)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}, name
        assert [stage.window for stage in arch.stages[:2]] == [(8, 8), (4, 4)]
        sam = name.startswith("sam2")
        assert [stage.window == stage.grid for stage in arch.stages] == [False, False, not sam, not sam]
        assert [block.src for block in arch.blocks if block.whole_map] == list(getattr(theirs, "global_att_blocks", ()))
        assert arch.depth == len(theirs.blocks)
        assert arch.headless == sam
    assert len(names) == 11


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hiera_tiny_224", {"q_pool": 2}, "not every stage halves the map"),
        ("hiera_tiny_224", {"mask_unit_size": (16, 16)}, "its mask units of 16x16 patches are no squares"),
        (
            "hiera_tiny_224",
            {"mask_unit_size": (2, 2), "mask_unit_attn": (True, False, True, True)},
            "mask units of no patches",
        ),
        ("hiera_tiny_224", {"patch_kernel": (4, 4), "patch_padding": (0, 0)}, "not a 7x7 convolution of stride 4"),
        ("hiera_tiny_224", {"global_pool": "max"}, "its pooling is 'max', not 'avg'"),
        ("hiera_tiny_224", {"head_mul": 1.0}, "widths and heads do not double"),
        ("sam2_hiera_tiny", {"q_pool": 2}, "not every stage halves the map"),
        ("sam2_hiera_tiny", {"global_att_blocks": (3,)}, "block 3 widens the stream, and attends over the whole map"),
        ("sam2_hiera_tiny", {"patch_size": (4, 4)}, "not a 7x7 convolution of stride 4"),
        ("sam2_hiera_tiny", {"img_size": (48, 64)}, "maps of images of 48x64 are not halved by all stages"),
        (
            "sam2_hiera_tiny",
            {"window_spec": (8, 4, 3, 1)},
            r"stages\[2\].window\[0\] = 3: must divide 4, the grid's side",
        ),
    ],
)
def test_models_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with without_values():
        model = made(name, **options)
    with pytest.raises(UserError, match=message):
        Arch.from_timm(model)


def test_a_block_that_widens_is_what_leads_to_a_stage_and_an_mlp() -> None:
    """Taken away, the stage begins with attention all the same; the stream may be cut on both sides of it."""
    model: Any = adopted(small())
    arch, x = arch_of(model), random_images(arch_of(model), 1)
    assert [block.mixer for block in arch.blocks] == ["attn", "none", "attn", "none", "attn", "attn", "none", "attn"]
    narrow: Any = cut(
        model, Cut(embed=(None, None, None, (0, 3, 5)), blocks=tuple(BlockCut(keep=i != 3) for i in range(8)))
    )
    entrance = narrow.stages[2].downsample
    assert [block.src for block in arch_of(narrow).blocks] == [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(entrance.attn.qkv.weight, model.stages[2].downsample.attn.qkv.weight)
    assert narrow.stages[3].downsample.attn.proj.weight.shape == (3, 64)
    with torch.no_grad():
        model.stages[2].blocks[0].mlp.fc2.weight.zero_()
        model.stages[2].blocks[0].mlp.fc2.bias.zero_()
        torch.testing.assert_close(narrow.forward_intermediates(x)[1][2], model.forward_intermediates(x)[1][2])


def test_what_other_code_asks_of_a_backbone(tmp_path: Path) -> None:
    model: Any = adopted(small("hiera_small_abswin_256")).float()
    folder, x = save(model, tmp_path / "own"), random_images(arch_of(model), 1, dtype=torch.float32)
    backbone: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(1, 2))
    maps = backbone.eval()(x)
    assert [tuple(one.shape[1:]) for one in maps] == [(16, 8, 8), (32, 4, 4)]
    assert backbone.feature_info.channels() == [16, 32]
    assert len(backbone.model.stages) == 3
    torch.testing.assert_close(maps[1], model.forward_intermediates(x)[1][2])
    with pytest.raises(ValueError, match="norm = True"):
        model.forward_intermediates(x, norm=True)
    last, (only,) = model.forward_intermediates(x, indices=[0], output_fmt="NHWC", stop_early=False)
    assert (last.shape[-1], only.shape[-1]) == (64, 8)
    torch.testing.assert_close(model.forward_head(last), model(x))
    assert model.no_weight_decay() == {"pos_embed"}
    groups = group_parameters(model, group_matcher=model.group_matcher(), reverse=True)
    entrance, block = groups["stages.1.downsample.mix.weight"], groups["stages.1.blocks.0.mlp.fc1.weight"]
    assert groups["stages.0.blocks.0.attn.qkv.weight"] < entrance == block < groups["head.fc.bias"]


def test_what_is_pruned_while_it_trains_is_the_masked_model() -> None:
    model: Any = adopted(small())
    arch, x = arch_of(model), random_images(arch_of(model), 1000)
    hook = NViTPruning(ladder(arch, 0.8), groups=GROUPS, interval=2, groups_per_step=8, exact=False)
    hook.wrap(model)
    for _ in train(model, hook):
        pass
    (snapshot,) = hook.snapshots
    narrow = arch_of(snapshot.model)
    assert narrow.query_pool == arch.query_pool
    assert cost(narrow).macs < cost(arch).macs
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), snapshot.model.eval()(x), rtol=0, atol=1e-9)


def test_what_pooled_queries_do_not_allow() -> None:
    model: Any = adopted(small())
    arch, x = arch_of(model), random_images(arch_of(model), 0)
    with pytest.raises(
        UserError, match="UVC prunes families .*; it has 'pooled_queries': every block that it gates has"
    ):
        UVC(UVCSettings(budgets=(0.5,))).wrap(model)
    with pytest.raises(UserError, match="it has 'pooled_queries'"):
        upvit.score(model, [(x, torch.zeros(len(x), dtype=torch.long))])
    with pytest.raises(UserError, match="subspaces are computed for"):
        compress(model, equal_shares(arch, 0.5), [x])
    choices = [BlockCut(mixer="conv3x3"), *[BlockCut()] * (arch.depth - 1)]
    assert cut(model, Cut(blocks=tuple(choices)))(x).shape == (3, 5)
    with pytest.raises(UserError, match="convolutions come from attention of .* not a block with mixer 'none'"):
        cut(model, Cut(blocks=(choices[1], choices[0], *choices[2:])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_pool": None}, "needs query_pool"),
        ({"query_pool": QueryPool(width=5, heads=2)}, "width = 5: must be a multiple of heads = 2"),
        ({"query_pool": QueryPool(width=0, heads=1)}, "query_pool.width = 0: must be a whole number of at least 1"),
        ({"patch_size": (2, 2), "img_size": (32, 32)}, r"needs patch_size = \(4, 4\)"),
        ({"act": "tanh"}, "act = 'tanh': must be one of"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    with without_values():
        arch = Arch.from_timm(timm.create_model("hiera_tiny_224", **PYRAMID))
    with pytest.raises(UserError, match=message):
        dataclasses.replace(arch, **fields).validate()


@pytest.mark.parametrize(
    ("stage", "window", "message"),
    [(1, (3, 8), "must divide 8, the grid's side"), (1, (1, 8), "must be even"), (3, (1, 2), None)],
)
def test_windows_fill_their_grid(stage: int, window: tuple[int, int], message: str | None) -> None:
    with without_values():
        arch = Arch.from_timm(timm.create_model("hiera_tiny_224", **PYRAMID))
    stages = [dataclasses.replace(own, window=window) if s == stage else own for s, own in enumerate(arch.stages)]
    other = dataclasses.replace(arch, stages=tuple(stages))
    if message is None:
        other.validate()
        return
    with pytest.raises(UserError, match=message):
        other.validate()


@pytest.mark.parametrize("name", ["hiera_tiny_224", "hiera_small_abswin_256"])
def test_nvit_s_saliency_has_all_that_writes_a_stream(name: str) -> None:
    """By hand for the second stage: what leads to it, its only block with attention, and both MLPs."""
    model: Any = adopted(small(name))
    model(random_images(arch_of(model), 3)).square().sum().backward()
    found = saliency.raw_saliency(model, arch_of(model))["stages.1.embed"]
    stage = model.stages[1]
    entrance, (first, second) = stage.downsample, stage.blocks
    written = [entrance.mix or entrance.proj, entrance.attn.proj, first.mlp.fc2, second.attn.proj, second.mlp.fc2]
    read = [first.mlp.fc1, second.attn.qkv, second.mlp.fc1]
    with torch.no_grad():
        wanted = sum((layer.weight * layer.weight.grad).sum(1) for layer in written)
        wanted += sum(layer.bias * layer.bias.grad for layer in written if layer.bias is not None)
        wanted += sum((layer.weight * layer.weight.grad).sum(0) for layer in read)
    torch.testing.assert_close(found, wanted)
