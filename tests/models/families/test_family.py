from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch

from prunesweep.models import Arch, Setting, UserError, build_table, cost, cut, load, save
from prunesweep.models.families import FAMILIES, families_with, family_of, register
from prunesweep.models.latency.building import macs_table
from prunesweep.models.reduction import Choose, reduce_tensor
from tests.contract_family import FamilyContract
from tests.generate import random_arch, random_cut, random_images, random_model
from tests.models.test_counting import counted_macs
from tests.toy_family import ToyFamily, toy_arch

NAMES = [*FAMILIES, "toy"]


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    register(ToyFamily())
    yield
    del FAMILIES["toy"]


def contract(name: str) -> FamilyContract:
    return FamilyContract(name, toy_arch if name == "toy" else partial(random_arch, family=name))


@pytest.mark.parametrize("name", NAMES)
def test_capabilities(name: str) -> None:
    contract(name).check_capabilities()


@pytest.mark.parametrize("name", NAMES)
def test_axes_and_places(name: str) -> None:
    for seed in range(10):
        contract(name).check_axes(seed)
        contract(name).check_places(seed)


@pytest.mark.parametrize("name", NAMES)
def test_models(name: str) -> None:
    for seed in range(5):
        contract(name).check_models(seed)


@pytest.mark.parametrize("name", NAMES)
def test_cost(name: str) -> None:
    for seed in range(5):
        contract(name).check_cost(seed, counted_macs)


@pytest.mark.parametrize("name", NAMES)
def test_streams(name: str) -> None:
    for seed in range(12):
        contract(name).check_streams(seed)


@pytest.mark.parametrize("name", NAMES)
def test_cut(name: str) -> None:
    for seed in range(5):
        contract(name).check_cut(seed)


@pytest.mark.parametrize("name", NAMES)
def test_saved(name: str, tmp_path: Path) -> None:
    contract(name).check_saved(3, tmp_path / "model")


@pytest.mark.parametrize("name", NAMES)
def test_projections(name: str) -> None:
    projected = sum(contract(name).check_projections(seed) for seed in range(4))
    least = 0 if contract(name).family.supports("difference_maps") else 8  # of which only the stream is projected
    assert projected > least or not contract(name).family.supports("streams")


def test_a_toy_family_from_outside(tmp_path: Path) -> None:
    """Built, cut, counted, saved and loaded like any other."""
    arch = toy_arch(Random(4))
    model, x = random_model(arch, 4, torch.float32), random_images(arch, 4, dtype=torch.float32)
    small = cut(model, random_cut(Random(5), arch))
    save(small, tmp_path / "small")
    again = load(tmp_path / "small").eval()
    assert cost(again.arch).macs < cost(arch).macs
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_unknown_family() -> None:
    with pytest.raises(
        UserError,
        match=r"family = 'swim': must be one of vit, eva, beit, diff, cait, xcit, .* metaformer, lm, toy. .*'swin'",
    ):
        family_of("swim")


def test_what_a_family_lacks_is_refused_with_its_name() -> None:
    arch = toy_arch(Random(0), missing=False)
    (stage,) = arch.stages
    planned = dataclasses.replace(stage.blocks[0], tokens=3)
    blocks = (planned, *stage.blocks[1:])
    with pytest.raises(UserError, match="family 'toy' needs the whole grid"):
        dataclasses.replace(arch, stages=(dataclasses.replace(stage, blocks=blocks),)).validate()
    with pytest.raises(UserError, match="family = 'toy': needs class_token = False"):
        dataclasses.replace(arch, class_token=True, pool="token").validate()


def test_names_are_taken_once() -> None:
    register(FAMILIES["vit"])  # the same object again
    twin = type("Twin", (ToyFamily,), {"name": "vit"})()
    with pytest.raises(ValueError, match="there is a family 'vit' already"):
        register(twin)
    wrong = type("Wrong", (ToyFamily,), {"name": "wrong", "capabilities": frozenset({"images", "wings"})})()
    with pytest.raises(ValueError, match="unknown capabilities wings"):
        register(wrong)
    assert "wrong" not in FAMILIES


def test_families_with() -> None:
    assert families_with("mixers") == ("vit", "eva", "beit", "diff", "cait", "swin", "hiera", "sam", "pit")
    of_images = (
        "vit",
        "eva",
        "beit",
        "diff",
        "cait",
        "xcit",
        "swin",
        "swin_v2",
        "hiera",
        "sam",
        "pvt_v2",
        "pit",
        "metaformer",
        "toy",
    )
    assert families_with("images") == of_images
    assert families_with("tokens", "global_attention") == ("vit", "eva", "diff", "cait")
    with pytest.raises(KeyError, match="wings"):
        families_with("wings")


@pytest.mark.parametrize(
    ("space", "writers", "readers"),
    [
        ("stages.0.embed", {"stem.weight", "stem.bias", "blocks.0.attn.proj.weight"}, {"classify.weight"}),
        ("blocks.1.v", {"blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias"}, {"blocks.1.attn.proj.weight"}),
        ("blocks.1.mlp", {"blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias"}, {"blocks.1.mlp.fc2.weight"}),
    ],
)
def test_writers_and_readers(space: str, writers: set[str], readers: set[str]) -> None:
    family, arch = family_of("toy"), toy_arch(Random(0), missing=False)
    found = set(family.writers(arch, space)), set(family.readers(arch, space))
    exact = space != "stages.0.embed"
    assert (found == (writers, readers)) if exact else (writers <= found[0] and readers <= found[1])


def test_a_stream_that_a_norm_writes_to_is_chosen_only() -> None:
    swin = Arch.from_timm("swin_tiny_patch4_window7_224")
    reductions = FAMILIES["swin"].reductions
    assert reductions(swin, "stages.0.embed") == ("choose",)
    assert reductions(swin, "stages.1.embed") == ("choose", "project")
    assert reductions(swin, "blocks.0.mlp") == ("choose",)
    vit = Arch.from_timm("vit_base_patch32_clip_224")
    assert vit.pre_norm
    assert FAMILIES["vit"].reductions(vit, "stages.0.embed") == ("choose",)


def test_side_by_side_spaces_are_reduced_each_by_itself() -> None:
    tensor = torch.arange(10).reshape(5, 2)
    small = reduce_tensor(tensor, [("a", "b")], {"a": 2, "b": 3}, {"b": Choose((2, 0))})
    assert small[:, 0].tolist() == [0, 2, 8, 4]
    whole = reduce_tensor(tensor, [("a", "b")], {"a": 2, "b": 3}, {})
    assert torch.equal(whole, tensor)
    assert whole.data_ptr() != tensor.data_ptr()


def test_its_latency_is_measured_and_predicted() -> None:
    arch = toy_arch(Random(2), ragged=False, missing=False)
    table = build_table(arch, Setting(batch=1, threads=1), points=2, repeats=1, min_seconds=0.0)
    assert table.predict(arch) > 0
    assert not any(name.startswith(("conv", "merge")) for name in table.stages[0])
    exact = macs_table(arch, ms_per_gmac=1.0)
    assert exact.predict(arch) == pytest.approx(cost(arch).macs / 1e9)
