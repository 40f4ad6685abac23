"""PVTv2-li: keys and values are read from a map that is averaged to a fixed number of places."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch

from prunesweep.models import Arch, BlockCut, Cut, UserError, arch_of, build, cost, cut, num_params
from prunesweep.models.families import family_of
from prunesweep.models.latency.building import macs_table
from prunesweep.models.without_values import without_values
from prunesweep.pruners import upvit
from prunesweep.pruners.subspaces import compress, equal_shares
from prunesweep.pruners.uvc.hook import UVC
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.generate import random_images
from tests.models.test_counting import counted_macs
from tests.oracle import masked


def small(**options: Any) -> Any:
    """A narrow timm model with random norms and biases, for 64x64 images."""
    shape = {"embed_dims": (8, 16), "depths": (1, 2), "num_heads": (1, 2), "mlp_ratios": 2, "sr_ratios": 1}
    model = timm.create_model("pvt_v2_b2_li", num_classes=5, **{**shape, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.double()


def own(img_size: int | tuple[int, int] = 64) -> Any:
    """The same, of its record for one size of images."""
    model = small()
    found = build(Arch.from_timm(model, img_size=img_size)).double().eval()
    found.load_state_dict(model.state_dict())
    return found


@pytest.mark.parametrize("img_size", [(64, 64), (36, 20)])  # more places than 7x7, and fewer
def test_a_full_record_is_the_same_function(img_size: tuple[int, int]) -> None:
    model = small()
    arch = Arch.from_timm(model, img_size=img_size)
    assert arch.pooled_map == 7
    assert Arch.from_json(arch.to_json()) == arch
    assert (cost(arch).params, cost(arch).macs) == (num_params(model), counted_macs(build(arch), arch))
    x = random_images(arch, 1)
    with torch.no_grad():
        torch.testing.assert_close(own(img_size)(x), model(x), rtol=1e-12, atol=1e-12)


def test_every_published_name_is_read() -> None:
    names = sorted({name.split(".")[0] for name in timm.list_pretrained("pvt_v2_*")})
    for name in names:
        with without_values():
            model = timm.create_model(name)
            arch = Arch.from_timm(model)
            found = build(arch).state_dict()
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in model.state_dict().items()}, name
        assert bool(arch.pooled_map) == name.endswith("_li")
    assert len(names) == 7


def test_a_cut_model_is_the_masked_one_and_has_its_cost() -> None:
    model: Any = own()
    first = BlockCut(qk=((0, 3),), v=((1, 2, 7),), mlp=(0, 5), sr=(2, 6, 7))
    decision = Cut(
        embed=((0, 1, 3, 6), None), blocks=(first, BlockCut(sr=tuple(range(0, 16, 3))), BlockCut(keep=False))
    )
    narrow = cut(model, decision)
    arch, x = arch_of(narrow), random_images(arch_of(model), 1)
    assert [block.sr for block in arch.blocks] == [3, 6]
    assert (cost(arch).params, cost(arch).macs) == (num_params(narrow), counted_macs(build(arch), arch))
    assert macs_table(arch, ms_per_gmac=1.0).predict(arch) == pytest.approx(cost(arch).macs / 1e9)
    with torch.no_grad(), masked(model, decision):
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-10)


def test_methods_of_pvt_v2_work() -> None:
    model: Any = own()
    arch = arch_of(model)
    batches = [random_images(arch, n, 8) for n in range(3)]
    x = random_images(arch, 9, 8)
    with torch.no_grad():
        narrow, chosen = (compress(model, equal_shares(arch, 0.6), batches, refit=refit) for refit in (True, False))
        error, without = (((one(x) - model(x)) ** 2).mean() for one in (narrow, chosen))
    assert max(block.sr for block in arch_of(narrow).blocks) < 16
    assert error < without
    labelled = [(batches[0], torch.zeros(8, dtype=torch.long))]
    scores = upvit.score(model, labelled, importance="exact", vectors=["blocks.0.sr", "blocks.1.attn"])
    gone = BlockCut(sr=tuple(range(1, 8)))
    with torch.no_grad():
        without_one = cut(model, Cut(blocks=(gone, BlockCut(), BlockCut())))
        change = torch.nn.functional.kl_div(
            without_one(batches[0]).log_softmax(-1), model(batches[0]).log_softmax(-1), log_target=True, reduction="sum"
        )
    assert scores.vectors["blocks.0.sr"][0].item() == pytest.approx(change.item(), rel=1e-6)
    UVC(UVCSettings(budgets=(0.7,))).wrap(model)
    assert torch.isfinite(model(x)).all()


def test_records_and_models_that_are_refused() -> None:
    arch = Arch.from_timm(small(), img_size=64)
    stages = (dataclasses.replace(arch.stages[0], sr_ratio=2), arch.stages[1])
    for fields, message in (
        ({"stages": stages}, "pooled_map = 7: needs sr_ratio = 1 in every stage"),
        ({"pooled_map": -1}, "pooled_map = -1: must be a whole number of at least 0"),
        ({"pooled_map": 0}, r"stages\[0\].blocks\[0\].sr = 8: must be 0 without attention on"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(arch, **fields).validate()  # type: ignore[arg-type]
    mixed = small()
    mixed.stages[1] = small(linear=False).stages[1]
    with pytest.raises(UserError, match="its blocks differ in whether keys and values read a pooled map"):
        Arch.from_timm(mixed, img_size=64)
    vit = Arch.from_timm("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="family = 'vit': needs pooled_map = 0"):
        dataclasses.replace(vit, pooled_map=7).validate()
    model: Any = own()
    assert family_of(arch).set_img_size(model, arch, (32, 48)).stages[0].grid == (8, 12)
