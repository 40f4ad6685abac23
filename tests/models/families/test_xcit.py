"""XCiT: the full record is the same function; MLP units, the stream and blocks are cut, attention stays whole."""

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
    CrossCovariance,
    Cut,
    Stem,
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
from prunesweep.models.without_values import without_values
from prunesweep.pruners import upvit
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.subspaces import compress, equal_shares
from prunesweep.pruners.uvc.hook import UVC
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.generate import random_arch, random_images, random_model
from tests.models.test_counting import counted_macs
from tests.pruners.nvit.test_hook import GROUPS, ladder, train


def small(name: str = "xcit_nano_12_p16_224", **options: Any) -> Any:
    """A narrow timm model with random norms, biases, factors and statistics."""
    shape = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **{**shape, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + (tensor.ndim == 1))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.abs_().add_(0.1)
    return model.double()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xcit_nano_12_p16_224", {"img_size": (32, 48)}),
        ("xcit_tiny_12_p8_224", {"num_classes": 0}),  # norms of all tokens in the class token's blocks
        ("xcit_nano_12_p16_224", {"qkv_bias": False, "use_pos_embed": False, "cls_attn_layers": 1}),
    ],
)
def test_an_adopted_model_is_the_same_function(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = small(name, **options)
    own = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert Arch.from_json(arch.to_json()) == arch
    assert arch.class_attention is not None
    assert arch.class_attention.norm_patches == ("p8" in name)
    assert (cost(arch).params, cost(arch).macs) == (num_params(own), counted_macs(build(arch), arch))
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(load(save(own, tmp_path / "own"))(x), own(x))


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_pretrained()}
    names = sorted(name for name in found if _model_to_module[name] == "xcit")
    shapes = {(name.split("_")[1], name.split("_")[3]) for name in names}
    for size, patch in sorted(shapes):  # those that differ in more than depth and image size
        model = next(name for name in names if name.split("_")[1] == size and name.split("_")[3] == patch)
        with without_values():
            theirs = timm.create_model(model, depth=1)
            arch = Arch.from_timm(theirs)
            own = build(arch).state_dict()
        positions = {} if theirs.pos_embed is None else {"pos_embed": own["pos_embed"]}
        family = family_of(arch)
        theirs.pos_embed = None  # which needs values
        given = {**family.adopted(theirs, arch), **positions}
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}, model
    assert len(names) == 28


def test_other_sizes_and_latency() -> None:
    model: Any = adopted(small())
    model.set_input_size((48, 32))
    arch = arch_of(model)
    assert arch.stages[0].grid == (3, 2)
    assert model(random_images(arch, 1)).shape == (3, 5)
    assert macs_table(arch, ms_per_gmac=1.0).predict(arch) == pytest.approx(cost(arch).macs / 1e9)
    with pytest.raises(UserError, match="patch_drop_rate = 0.5"):
        family_of(arch).set_patch_drop_rate(model, arch, 0.5)


def test_what_is_pruned_while_it_trains_is_the_masked_model() -> None:
    arch = random_arch(Random(0), "xcit", ragged=False, missing=False, extras=False)
    model, x = random_model(arch, 0), random_images(arch, 1000)
    hook = NViTPruning(ladder(arch, 0.5), groups=GROUPS, interval=2, groups_per_step=4, exact=False)
    hook.wrap(model)
    for _ in train(model, hook):
        pass
    (snapshot,) = hook.snapshots
    narrow = arch_of(snapshot.model)
    assert (narrow.cross_covariance, narrow.class_attention) == (arch.cross_covariance, arch.class_attention)
    assert narrow.stages[0].width < arch.stages[0].width
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), snapshot.model.eval()(x), rtol=0, atol=1e-9)


def test_what_attention_between_channels_does_not_allow() -> None:
    arch = random_arch(Random(1), "xcit", ragged=False, missing=False, extras=False)
    model, x = random_model(arch, 0), random_images(arch, 0)
    with pytest.raises(UserError, match="UVC prunes families .*; it has 'channel_attention': it gates heads"):
        UVC(UVCSettings(budgets=(0.5,))).wrap(model)
    with pytest.raises(UserError, match="it has 'channel_attention'"):
        upvit.score(model, [(x, torch.zeros(len(x), dtype=torch.long))])
    with pytest.raises(
        UserError, match="subspaces are computed for .* it lacks 'streams': its blocks have a third part"
    ):
        compress(model, equal_shares(arch, 0.5), [x])
    for choice, message in (
        (BlockCut(qk=((0,),), v=((0,),)), "attention between channels stays whole"),
        (BlockCut(mixer="conv3x3"), "convolutions come from attention of"),
        (BlockCut(mixer="norm"), "must be 'xca' or 'none', without norm_residual"),
    ):
        with pytest.raises(UserError, match=message):
            cut(model, Cut(blocks=(choice, *[BlockCut()] * (arch.depth - 1))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_covariance": None}, "needs cross_covariance"),
        ({"cross_covariance": CrossCovariance(width=5, heads=2)}, "width = 5: must be a multiple of heads = 2"),
        ({"stem": Stem(kind="conv3x3", channels=(), strides=(2,))}, "without stem.strides"),
        ({"family": "cait", "cross_covariance": None}, "stem"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    arch = random_arch(Random(1), "xcit", ragged=False, missing=False, extras=False)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(arch, **fields).validate()


def test_a_block_may_lose_its_mixer_or_its_mlp() -> None:
    model: Any = adopted(small())
    narrow: Any = cut(model, Cut(blocks=(BlockCut(mixer="none", mlp=(0, 5)), BlockCut(mlp=()))))
    x = random_images(arch_of(model), 1)
    assert num_params(narrow) == cost(arch_of(narrow)).params
    with torch.no_grad():
        for block in (model.blocks[0], narrow.blocks[0]):
            assert hasattr(block, "local_mp") == (block is model.blocks[0])
        model.blocks[0].ls1.gamma.zero_()
        model.blocks[0].ls3.gamma.zero_()
        model.blocks[0].mlp.fc2.weight[:, [i for i in range(96) if i not in (0, 5)]] = 0
        model.blocks[1].ls2.gamma.zero_()
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-10)
