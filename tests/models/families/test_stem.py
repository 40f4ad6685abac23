"""Stems of convolutions in front of ViTs: the full record is the same function, and only the stream's channels go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.models._registry import _model_to_module

from prunesweep.models import Arch, BlockCut, Cut, Stem, UserError, arch_of, build, cost, cut, load, save
from prunesweep.models.families.stem import WRITES
from prunesweep.models.latency.building import macs_table
from prunesweep.models.recalibrate import recalibrate
from prunesweep.models.without_values import without_values
from prunesweep.pruners import nvit
from prunesweep.pruners.subspaces.compression import compress
from prunesweep.pruners.subspaces.widths import equal_shares
from prunesweep.pruners.uvc.resource import Resource
from tests.contract_family import FamilyContract
from tests.generate import random_images, random_model, random_vit
from tests.models.test_counting import counted_macs

STEMS = (
    Stem(kind="convolutions", channels=(6, 5), strides=(2, 1, 2)),
    Stem(kind="convolutions", channels=(), strides=(3,)),
    Stem(kind="resnet", channels=(32,)),
    Stem(kind="resnet", channels=(32, 128, 128), blocks=(2, 1)),
    Stem(kind="t2t_performer", channels=(6, 5), strides=(2, 1, 2)),
    Stem(kind="t2t_transformer", channels=(6,), strides=(3, 2)),
    Stem(kind="mbconv", channels=(4, 5, 5), blocks=(2, 1)),
)
STRIDES = (4, 3, 4, 8, 4, 6, 16)


def random_hybrid(random: Random) -> Arch:
    """A ViT with any kind of stem, on images of few patches."""
    arch, kind = random_vit(random, ragged=True, missing=True, extras=True), random.randrange(len(STEMS))
    patch = STRIDES[kind] * (1 if STEMS[kind].kind in WRITES else random.choice([1, 2]))
    rows, columns = arch.stages[0].grid
    own: dict[str, Any] = {
        "stem": STEMS[kind],
        "patch_size": (patch, patch),
        "img_size": (rows * patch, columns * patch),
    }
    if STEMS[kind].kind in WRITES:
        own["pre_norm"] = False
    return dataclasses.replace(arch, **own)


CONTRACT = FamilyContract("vit", random_hybrid)


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 6, 8, 9, 21, 25, 26, 31, 35])  # every kind
def test_contract_with_stems(seed: int, tmp_path: Path) -> None:
    CONTRACT.check_axes(seed)
    CONTRACT.check_models(seed)
    CONTRACT.check_cost(seed, counted_macs)
    CONTRACT.check_cut(seed)
    CONTRACT.check_streams(seed)
    CONTRACT.check_saved(seed, tmp_path / "model")


def test_projected_streams_with_stems() -> None:
    assert sum(CONTRACT.check_projections(seed) for seed in (0, 1, 5, 26)) > 8


@pytest.mark.parametrize("name", ["vit_base_mci_224", "vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
def test_the_full_record_is_the_same_function(name: str) -> None:
    model = timm.create_model(name, img_size=64, depth=1, num_classes=3).double().eval()
    arch, x = Arch.from_timm(model), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    ours = build(arch).double().eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-12)


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_models(pretrained=True)}
    names = [name for name in found if _model_to_module[name] == "vision_transformer_hybrid"]
    for name in names:
        with without_values():
            model = timm.create_model(name, depth=1)
            arch = Arch.from_timm(model)
            own = build(arch).state_dict()
        assert Arch.from_json(arch.to_json()) == arch
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in model.state_dict().items()}, name
        assert cost(arch).params == sum(p.numel() for p in model.parameters())
    assert len(names) == 9


def small(kind: int, **fields: Any) -> Arch:
    """A ViT of two blocks behind a stem, on two by three patches."""
    drawn = random_vit(Random(1), ragged=False, missing=False, extras=False)
    patch, (stage,) = STRIDES[kind], drawn.stages
    stage = dataclasses.replace(stage, width=12, grid=(2, 3), blocks=(stage.blocks[0],) * 2)
    own = {"dist_token": False, "pre_norm": False, "num_classes": 3, "stem": STEMS[kind]}
    sizes = {"patch_size": (patch, patch), "img_size": (2 * patch, 3 * patch)}
    return dataclasses.replace(drawn, stages=(stage,), **{**own, **sizes, **fields})


@pytest.mark.parametrize("kind", [0, 3, 6])
def test_a_cut_takes_channels_of_what_writes_the_stream_alone(kind: int) -> None:
    model: Any = random_model(small(kind), 0)
    kept = (0, 3, 4, 7, 8, 11)
    narrow: Any = cut(model, Cut(embed=(kept,), blocks=(BlockCut(),) * 2))
    before, after = (one.patch_embed.state_dict() for one in (model, narrow))
    writer = {0: "backbone.2.conv", 3: "proj", 6: "backbone.pool.proj"}[kind]
    for name, tensor in after.items():
        wanted = before[name][list(kept)] if name.startswith(writer) else before[name]
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("kind", [0, 3, 6])
def test_methods_score_and_compress_what_is_behind_a_stem(kind: int) -> None:
    arch = small(kind)
    model, x = random_model(arch, 0, torch.float32), random_images(arch, 0, batch=8, dtype=torch.float32)
    scores = nvit.score(model, [(x, torch.arange(8) % 3)])
    assert (scores.vectors["stages.0.embed"] > 0).all()
    narrow = compress(model, equal_shares(arch, 0.5), [x])
    assert (arch_of(narrow).stages[0].width, arch_of(narrow).stem) == (6, arch.stem)
    assert narrow(x).shape == (8, 3)
    assert Resource.of(arch, "paper").fixed < 1
    table = macs_table(arch, ms_per_gmac=1.0)
    assert table.predict(arch) == pytest.approx(cost(arch).macs / 1e9)


def test_a_stem_keeps_its_statistics() -> None:
    model: Any = random_model(small(0), 0, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert recalibrate(model, [(random_images(model.arch, 1, dtype=torch.float32), torch.zeros(3))]) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sizes_are_of_whole_patches(tmp_path: Path) -> None:
    model: Any = random_model(small(3), 0, torch.float32)
    model.set_input_size((24, 32))
    arch = arch_of(model)
    assert (arch.img_size, arch.patch_size, arch.stages[0].grid) == ((24, 32), (8, 8), (3, 4))
    x = random_images(arch, 0, dtype=torch.float32)
    assert torch.equal(load(save(model, tmp_path / "sized")).eval()(x), model(x))
    with pytest.raises(UserError, match=r"img_size = \[24, 30\]: the model's stem needs multiples of \[8, 8\]"):
        model.set_input_size((24, 30))
    with pytest.raises(UserError, match="patch_size = 16: the patches of random follow from its stem"):
        model.set_input_size(patch_size=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stem": Stem(kind="mbconv", channels=(3, 4), blocks=(1, 1))},
            r"\[3, 4\]: needs those of the first",
        ),
        ({"stem": Stem(kind="pool", channels=(3,))}, "stem.kind = 'pool': must be one of convolutions, resnet, mbconv"),
        ({"stem": Stem(kind="resnet", channels=(30,))}, r"stem.channels\[0\] = 30: must be a multiple of 32"),
        (
            {"stem": Stem(kind="resnet", channels=(32, 64), blocks=(1,))},
            r"channels\[1\] = 64: must be a multiple of 128",
        ),
        ({"stem": Stem(kind="resnet", channels=(32, 128))}, "one number for each of stem.blocks"),
        ({"stem": Stem(kind="convolutions", channels=(3,), strides=(4,))}, "one number for each of stem.strides but"),
        ({"stem": Stem(kind="convolutions", channels=(3,), strides=(4, 4))}, r"must be \[16, 16\], the stem's stride"),
        ({"stem": Stem(kind="convolutions", channels=(0,), strides=(2, 4))}, r"stem.channels\[0\] = 0"),
        ({"img_size": (16, 28)}, r"img_size = \[16, 28\]: a stem needs multiples of \[8, 8\]"),
    ],
)
def test_impossible_stems_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(3, **fields).validate()


def test_a_convolution_that_writes_the_stream_has_a_bias() -> None:
    with pytest.raises(UserError, match="needs pre_norm = False, its last convolution has a bias"):
        small(0, pre_norm=True).validate()
