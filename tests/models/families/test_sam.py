"""Segment Anything's encoder: the full record is the same function, in windows or not; the neck keeps its width."""

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
    PositionBias,
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
from prunesweep.models.features import features
from prunesweep.models.io.export import export
from prunesweep.models.latency.building import macs_table
from prunesweep.models.without_values import without_values
from tests.generate import random_arch, random_images, random_model
from tests.models.test_counting import counted_macs

SMALL = {"img_size": 64, "embed_dim": 12, "num_heads": 2, "depth": 2, "window_size": 3, "global_attn_indexes": (1,)}
CASES: list[dict[str, Any]] = [
    {},  # windows that do not divide the map
    {"neck_chans": 8, "use_abs_pos": True, "num_classes": 0},
    {"img_size": (48, 80), "pre_norm": True, "init_values": 0.1},
    {"use_rel_pos": False, "window_size": 0},
    {"qk_norm": True, "qkv_bias": False, "global_attn_indexes": (), "window_size": 2},
    {"neck_chans": 8, "patch_size": 8, "img_size": 32, "in_chans": 1, "mlp_ratio": 3},
]


def small(**options: Any) -> Any:
    """A narrow timm model with random norms, biases and positions."""
    model = timm.create_model("samvit_base_patch16_224", **{**SMALL, "num_classes": 5, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.double()


def own(seed: int = 0, **fields: Any) -> tuple[Arch, Any]:
    """A model of a random record with relative positions and a neck."""
    arch = random_arch(Random(seed), "sam", ragged=False, missing=False, extras=False)
    plain = {"qk_norm": False, "pre_norm": False, "position_bias": PositionBias(kind="decomposed"), "neck": 5}
    arch = dataclasses.replace(arch, **{**plain, **fields})
    return arch, random_model(arch, seed)


@pytest.mark.parametrize("options", CASES)
def test_an_adopted_model_is_the_same_function(options: dict[str, Any], tmp_path: Path) -> None:
    model = small(**options)
    with pytest.warns(UserWarning, match="takes images of any size; its record is for"):
        ours = adopted(model)
    arch = arch_of(ours)
    x = random_images(arch, 1)
    assert Arch.from_json(arch.to_json()) == arch
    assert (cost(arch).params, cost(arch).macs) == (num_params(ours), counted_macs(build(arch), arch))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.forward_features(x), model.forward_features(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(load(save(ours, tmp_path / "ours"))(x), ours(x))


@pytest.mark.filterwarnings("ignore:.*images of any size")
def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_pretrained()}
    names = sorted(name for name in found if _model_to_module[name] == "vision_transformer_sam")
    for name in names:
        with without_values():
            model = timm.create_model(name, depth=3)
            arch = Arch.from_timm(model)
            ours, given = build(arch).state_dict(), family_of(arch).adopted(model, arch)
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in given.items()}, name
        assert [block.whole_map for block in arch.blocks] == [not b.window_size for b in model.blocks]
        assert (arch.neck, arch.outputs, arch.headless, arch.stages[0].window) == (256, 256, True, (14, 14))
    assert len(names) == 3


@pytest.mark.filterwarnings("ignore:.*images of any size")
def test_another_size_is_what_timm_computes_of_such_images() -> None:
    """timm resamples positions, absolute and relative, for every batch; windows stay as they are."""
    model = small(use_abs_pos=True, neck_chans=8)
    ours = adopted(model)
    ours.set_input_size((80, 48))
    arch = arch_of(ours)
    assert (arch.img_size, arch.stages[0].grid, arch.stages[0].window) == ((80, 48), (5, 3), (3, 3))
    x = random_images(arch, 0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-6, atol=1e-6)  # positions are resampled in float32
    with pytest.raises(UserError, match=r"img_size = \[32, 64\]: gives 2x4 patches, windows have 3x3"):
        ours.set_input_size((32, 64))
    with pytest.raises(UserError, match="patch_size = 8: must be left out"):
        ours.set_input_size(patch_size=8)


def test_features_behind_the_neck_have_its_width_in_a_narrower_model() -> None:
    """Without a head: (B, rows, columns, C), and their average; no map back to the source's width is needed."""
    arch, model = own(num_classes=0)
    narrow = cut(model, Cut(embed=((0, 2),), blocks=(BlockCut(),) * arch.depth))
    record, x = arch_of(narrow), random_images(arch, 0)
    assert (record.num_classes, record.feature_head, record.outputs) == (0, False, 5)
    with torch.no_grad():
        found = features(narrow, x)
        assert found.shape == (3, *arch.stages[0].grid, 5)
        torch.testing.assert_close(found.permute(0, 3, 1, 2), narrow.forward_features(x))
        torch.testing.assert_close(found.mean((1, 2)), narrow(x))
        assert features(narrow, x, 0).shape == (3, *arch.stages[0].grid, 2)


def test_a_head_may_take_channels_of_several_and_its_positions_with_them() -> None:
    """Two heads whose query channels are mixed: logits are sums over channels, so all of them in one head are one."""
    arch, model = own(1)
    block = arch.blocks[0]
    everything = tuple(range(block.heads * block.qk)), tuple(range(block.total_v))
    one = cut(model, Cut(blocks=(BlockCut(qk=everything[:1], v=everything[1:]), *[BlockCut()] * (arch.depth - 1))))
    attn, x = one.blocks[0].attn, random_images(arch, 0)
    q = torch.randn(2, block.heads, attn.grid[0] * attn.grid[1], block.qk, dtype=torch.float64)
    joint = q.transpose(1, 2).flatten(2)[:, None]
    with torch.no_grad():
        torch.testing.assert_close(
            attn.position_bias(joint), model.blocks[0].attn.position_bias(q).sum(1, keepdim=True)
        )
        assert torch.isfinite(one(x)).all()


def test_blocks_over_the_whole_map_have_latencies_of_their_own() -> None:
    arch, _ = own(2)
    spans = tuple(dataclasses.replace(b, whole_map=i == 0) for i, b in enumerate(arch.blocks))
    arch = dataclasses.replace(arch, stages=(dataclasses.replace(arch.stages[0], blocks=spans),))
    table = macs_table(arch, ms_per_gmac=1.0)
    assert "attn_whole_map" in table.stages[0]
    assert table.predict(arch) == pytest.approx(cost(arch).macs / 1e9)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_exported_models_have_windows_and_positions(to: str, tmp_path: Path) -> None:
    arch, _ = own(2)
    assert {block.whole_map for block in arch.blocks} == {True, False}
    assert export(random_model(arch, 2, torch.float32), tmp_path / "model", to) < 1e-5


@pytest.mark.slow
def test_relative_positions_stay_floats_where_an_onnx_file_has_integers(tmp_path: Path) -> None:
    """onnxruntime multiplies integers with one matrix alone, not with one for every row of the map."""
    arch = random_arch(Random(11), "sam")
    assert arch.position_bias is not None
    assert export(random_model(arch, 0, torch.float32), tmp_path / "m.onnx", "onnx", precision="int8-dynamic") < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_rope": True, "use_rel_pos": False, "embed_dim": 16}, "turns queries and keys by their places"),
        ({"head_hidden_size": 7}, "its head has a hidden layer"),
        ({"global_pool": "max"}, "its pooling is 'max', not 'avg'"),
        ({"global_pool": "", "num_classes": 0}, "its pooling is '', not 'avg'; of a model that is pooled"),
        ({"window_size": 9}, "are larger than its map of 4x4 patches"),
    ],
)
def test_what_has_no_record_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Arch.from_timm(small(**options))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neck": -1}, "neck = -1: must be a whole number of at least 0"),
        ({"position_bias": PositionBias(kind="table")}, "position_bias.kind = 'table': must be one of decomposed"),
        ({"position_bias": PositionBias(kind="decomposed", hidden=2)}, "position_bias.hidden = 2: must be 0"),
        ({"family": "swin"}, "family = 'swin': needs"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    arch, _ = own()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(arch, **fields).validate()


def test_only_families_with_both_have_blocks_over_the_whole_map() -> None:
    swin = random_arch(Random(0), "swin", missing=False, extras=False)
    (first, *rest), stage = swin.stages[0].blocks, swin.stages[0]
    stage = dataclasses.replace(stage, blocks=(dataclasses.replace(first, whole_map=True), *rest))
    with pytest.raises(UserError, match=r"blocks\[0\].whole_map: family 'swin' has no attention"):
        dataclasses.replace(swin, stages=(stage, *swin.stages[1:])).validate()
