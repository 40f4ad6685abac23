"""XCiT: the full record is the same function; heads, MLP units, the stream and blocks are cut."""

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
    Stem,
    UserError,
    adopted,
    arch_of,
    build,
    cost,
    cut,
    cut_arch,
    load,
    num_params,
    save,
)
from prunesweep.models.families import family_of
from prunesweep.models.latency.building import macs_table
from prunesweep.models.without_values import without_values
from prunesweep.pruners import WidthMethod, get_method, upvit
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.ranked import GROUP_SIZES
from prunesweep.pruners.subspaces import compress, equal_shares
from prunesweep.pruners.uvc.hook import UVC
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.generate import random_arch, random_images, random_model
from tests.models.test_counting import counted_macs
from tests.pruners.nvit.test_hook import GROUPS, least, train


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
    groups = GROUPS | {"mlp": 64}  # of the units few are left to take, so that heads go
    budget = (4 * least(arch, groups=groups) + cost(arch).macs) / 5
    hook = NViTPruning([budget], groups=groups, interval=2, groups_per_step=4, exact=False)
    hook.wrap(model)
    for _ in train(model, hook):
        pass
    (snapshot,) = hook.snapshots
    narrow = arch_of(snapshot.model)
    assert narrow.class_attention == arch.class_attention
    assert all(new.qk == old.qk for new, old in zip(narrow.blocks, arch.blocks, strict=True))
    assert sum(block.heads for block in narrow.blocks) < sum(block.heads for block in arch.blocks)
    assert narrow.stages[0].width < arch.stages[0].width
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), snapshot.model.eval()(x), rtol=0, atol=1e-9)


def test_what_attention_between_channels_does_not_allow() -> None:
    arch = random_arch(Random(1), "xcit", ragged=False, missing=False, extras=False)
    model, x = random_model(arch, 0), random_images(arch, 0)
    with pytest.raises(UserError, match="UVC prunes families .*; it has 'channel_attention': it gates value channels"):
        UVC(UVCSettings(budgets=(0.5,))).wrap(model)
    with pytest.raises(UserError, match="it has 'channel_attention'"):
        upvit.score(model, [(x, torch.zeros(len(x), dtype=torch.long))])
    with pytest.raises(
        UserError, match="subspaces are computed for .* it lacks 'streams': its blocks have a third part"
    ):
        compress(model, equal_shares(arch, 0.5), [x])
    for choice, message in (
        (BlockCut(qk=((0, 1),), v=((0,),)), "keep all channels of the head, as qk and as v"),
        (BlockCut(qk=((0,),), v=((0,),)), "a softmax runs over all channels of a head; keep all channels of the head"),
        (BlockCut(qk=((0, 3),), v=((0, 3),)), "a softmax runs over all channels of a head; keep channels of one head"),
        (BlockCut(mixer="conv3x3"), "convolutions come from attention of"),
        (BlockCut(mixer="norm"), "must be 'xca' or 'none', without norm_residual"),
    ):
        with pytest.raises(UserError, match=message):
            cut(model, Cut(blocks=(choice, *[BlockCut()] * (arch.depth - 1))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": Stem(kind="conv3x3", channels=(), strides=(2,))}, "without stem.strides"),
        ({"family": "cait"}, "stem"),
    ],
)
def test_impossible_records_are_refused(fields: dict[str, Any], message: str) -> None:
    arch = random_arch(Random(1), "xcit", ragged=False, missing=False, extras=False)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(arch, **fields).validate()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 0}, r"blocks\[0\].heads = 0"),
        ({"v": 1}, "v = 1: must be qk"),
        ({"scale": 1.0}, "scale = 1.0: must be 0 where mixer is 'xca', whose factor is learned"),
    ],
)
def test_impossible_attention_between_channels_is_refused(fields: dict[str, Any], message: str) -> None:
    arch = arch_of(adopted(small()))
    (stage,) = arch.stages
    blocks = (dataclasses.replace(stage.blocks[0], **fields), *stage.blocks[1:])
    with pytest.raises(UserError, match=message):
        dataclasses.replace(arch, stages=(dataclasses.replace(stage, blocks=blocks),)).validate()


def test_heads_go_whole_and_each_block_has_its_own_number() -> None:
    """The others' softmax does not see them: a head that goes is as one whose values are nothing."""
    model: Any = adopted(small())
    whole = range(8)
    first = BlockCut.aligned(arch_of(model).blocks[0], heads=(0, 2), qk=whole, v=whole, mlp=None)
    narrow: Any = cut(model, Cut(blocks=(first, BlockCut())))
    arch, x = arch_of(narrow), random_images(arch_of(model), 1)
    assert [(block.heads, block.qk, block.v) for block in arch.blocks] == [(2, 8, 8), (3, 8, 8)]
    assert torch.equal(narrow.blocks[0].attn.temperature, model.blocks[0].attn.temperature[[0, 2]])
    assert (cost(arch).params, cost(arch).macs) == (num_params(narrow), counted_macs(build(arch), arch))
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, 8:16] = 0
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["nvit", "taylor", "isomorphic", "magnitude"])
def test_methods_take_heads_that_give_nothing_first(name: str) -> None:
    model: Any = adopted(small())
    arch, method = arch_of(model), get_method(name, WidthMethod)
    with torch.no_grad():
        qkv = model.blocks[0].attn.qkv.weight.view(3, 3, 8, 24)
        qkv[:, 1] *= 1e-6
        model.blocks[0].attn.proj.weight[:, 8:16] *= 1e-6
    batch = (random_images(arch, 2), torch.tensor([0, 1, 2]))
    scores = method.score(model, [batch])
    vector = scores.vectors["blocks.0.heads"]
    assert vector.shape == (3,)
    assert vector.abs().argmin() == 1
    if name != "isomorphic":
        groups = dict.fromkeys(GROUP_SIZES, 0) | {"heads": 1}
        found = method.decide(arch, scores, 0.95 * cost(arch).macs, groups=groups).cut
        assert found.blocks[0].qk == (tuple(range(8)), tuple(range(16, 24)))
    narrow = cut_arch(arch, method.decide(arch, scores, 0.6 * cost(arch).macs).cut)
    assert all(block.qk == 8 for block in narrow.blocks)


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
