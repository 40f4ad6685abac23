from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm, RmsNormFp32
from timm.models._registry import _model_to_module
from timm.optim import param_groups_weight_decay
from torch import nn

from prunesweep.models import (
    Arch,
    BlockCut,
    Cut,
    UserError,
    adopted,
    arch_of,
    block_views,
    build,
    cost,
    cut,
    num_params,
)
from prunesweep.models.arch import Rope
from prunesweep.models.families import family_of
from prunesweep.models.layers.rotary import Places, merged_places, place_coordinates
from prunesweep.models.layers.token_merging import TokenPlan, make_merge
from prunesweep.models.without_values import without_values
from tests.generate import random_eva, random_images, random_model
from tests.models.test_counting import counted_macs

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
KINDS = [  # of position embedding, projections, biases, MLPs, norms, prefix tokens
    ("eva02_tiny_patch14_224", (28, 42)),
    ("eva02_base_patch14_448", (28, 42)),
    ("eva02_base_patch16_clip_224", (32, 48)),
    ("eva_giant_patch14_224", (28, 42)),
    ("vit_small_patch16_dinov3", (32, 48)),
    ("vit_small_plus_patch16_dinov3_qkvb", (32, 48)),
    ("vit_small_patch16_rope_224", (32, 48)),
    ("vit_small_patch16_rope_mixed_ape_224", (32, 48)),
    ("vit_betwixt_patch16_rope_reg4_gap_256", (32, 48)),
    ("vit_pe_spatial_base_patch16_512", (32, 48)),
    ("vit_pe_core_base_patch16_224", (32, 48)),
    ("aimv2_large_patch14_224", (28, 42)),
    ("beit3_base_patch16_224", (32, 48)),
    ("eva02_enormous_patch14_clip_224", (28, 42)),
    ("vit_base_patch16_rpn_224", (32, 48)),
    ("vit_base_patch16_sapiens2", (32, 48)),
]
OTHERS = ("aimv2_", "beit3_", "vit_base_patch16_rpn_")
MODULES = ("eva", "naflexvit", "qwen3_vit", "deepseek_vit", "vitamin")  # timm's
REFUSED = {
    **{
        f"qwen3_vit_{size}_{what}": reason
        for size in ("88m", "306m", "416m")
        for what, reason in (
            ("enc", "gives one vector for every 2x2 patches, .*create it with global_pool = 'avg'"),
            ("merge", "reads 2x2 patches at once behind its blocks, .*create it with encoder_pool = ''"),
        )
    },
    "deepseek_vit_412m_enc": "gives one vector for every 3x3 patches, .*create it with global_pool = 'avg'",
    "deepseek_vit_412m_align": "reads 3x3 patches at once behind its blocks, .*create it with encoder_pool = ''",
}


def shared(name: str, *heads: int) -> dict[str, Any]:
    """Heads of keys and values, block by block, of a model that has such a list."""
    return {"num_kv_heads": heads} if name.endswith("sapiens2") else {}


def small(name: str, size: tuple[int, int], dtype: torch.dtype = torch.float64, second: int = 2) -> nn.Module:
    """A narrow timm model with random norms and biases, whose second block may share keys and values."""
    model = timm.create_model(name, img_size=size, **{**SMALL, **shared(name, 2, second)}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.to(dtype)


def names() -> Iterator[str]:
    """The architectures of timm's modules, and those of others that are of this family."""
    found = sorted({name.split(".")[0] for name in timm.list_pretrained()})
    yield from (name for name in found if _model_to_module[name] in MODULES or name.startswith(OTHERS))


@pytest.mark.parametrize(("name", "size"), KINDS)
def test_an_adopted_model_is_the_same_function(name: str, size: tuple[int, int]) -> None:
    model = small(name, size)
    own, x = adopted(model), random_images(Arch.from_timm(model), 1)
    arch = arch_of(own)
    assert arch == Arch.from_timm(model)
    assert Arch.from_json(arch.to_json()) == arch
    assert cost(arch).params == num_params(own) == num_params(model)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own.float()(x.float()), model.float()(x.float()), rtol=1e-5, atol=1e-5)
    assert own.pretrained_cfg["mean"] == model.pretrained_cfg["mean"]
    assert not {t.data_ptr() for t in own.parameters()} & {t.data_ptr() for t in model.parameters()}


def test_every_published_name_is_read_or_refused_with_its_reason() -> None:
    """Of those that are read, an empty timm model's weights are those of the record's, by name and shape."""
    read = []
    for name in names():
        with without_values():
            shallow = {} if name in REFUSED else {"depth": 2, **shared(name, 0, 0)}  # all blocks are alike
            model = timm.create_model(name, **shallow)
        if name in REFUSED:
            with pytest.raises(UserError, match=REFUSED[name]):
                Arch.from_timm(model)
            continue
        own = adopted_on_meta(model)
        if not name.startswith(("qwen3", "deepseek", "naflex")):  # other positions, a norm without weights
            assert cost(own).params == num_params(model), name
        read.append(name)
    assert len(read) == 108


def adopted_on_meta(model: Any) -> Arch:
    arch = Arch.from_timm(model)
    with without_values():
        own = build(arch).state_dict()
        given = family_of(arch).adopted(model, arch)
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}
    return arch


@pytest.mark.parametrize("name", ["base_patch16_par_gap", "base_patch16_parfac_gap", "base_patch16_siglip"])
def test_a_naflex_vit_is_read_at_one_size(name: str) -> None:
    sized = {"pretrained_cfg_overlay": {"input_size": (3, 32, 48)}, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model(f"naflexvit_{name}", num_classes=5, **sized).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    with pytest.warns(UserWarning, match="takes images of any size; its record is for 32x48 images"):
        own = adopted(model.double())
    x = random_images(arch_of(own), 1)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match=r"images of 30x48 are no whole patches of \(16, 16\)"):
        Arch.from_timm(model, img_size=(30, 48))


def test_behind_inverted_bottlenecks_mlps_begin_with_a_norm() -> None:
    """ViTamin: the stem stays, but for the convolution that writes the stream."""
    model: Any = timm.create_model("vitamin_small_224", img_size=(32, 48), depth=1, num_classes=5).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.05)
    own: Any = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert (arch.stem.kind, arch.mlp_entry_norm, arch.glu) == ("mbconv", True, True)
    assert cost(arch).params == num_params(own) == num_params(model)
    assert "project" not in family_of(arch).reductions(arch, "stages.0.embed")
    narrow: Any = cut(own, Cut(embed=((0, 3),), blocks=(BlockCut(),)))
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
    stem, small_stem = (dict(one.patch_embed.backbone.named_parameters()) for one in (own, narrow))
    assert {name for name, tensor in stem.items() if tensor.shape != small_stem[name].shape} == {
        "pool.proj.weight",
        "pool.proj.bias",
    }
    with pytest.raises(UserError, match="mlp_entry_norm = true: needs glu = True"):
        dataclasses.replace(arch, glu=False).validate()


@pytest.mark.parametrize("side", [4, 2])
def test_a_language_model_s_tower_is_read_with_positions_of_its_grid(side: int) -> None:
    """Its angles are rounded to float32, as records have them."""
    model: Any = small("qwen3_vit_88m", (32, 48))
    model.encoder.pos_embed_grid_size = side
    model.encoder.pos_embed = nn.Parameter(torch.randn(1, side**2, 24, dtype=torch.float64))
    rope = model.encoder.rope
    with pytest.warns(UserWarning, match="its record is for 32x48 images"):
        own = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert (arch.head_norm, arch.pool, arch.num_classes, arch.act) == ("pooled", "avg", 5, "gelu_tanh")
    rope.float()
    embed = rope.get_embed
    rope.get_embed = lambda shape: embed(shape=shape).double()
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
        model.encoder.global_pool = "avg"
        tower = adopted(model.encoder)
        assert (arch_of(tower).num_classes, arch_of(tower).head_norm) == (0, "none")
        torch.testing.assert_close(tower(x), model.encoder(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"final_norm": False}])
def test_deepseek_s_tower_has_norms_over_tokens_and_over_their_average(options: dict[str, Any]) -> None:
    """timm rounds its norms and angles to float32, which are compared in float64 here."""
    model: Any = timm.create_model("deepseek_vit_412m", img_size=(28, 42), **{**SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    own = adopted(model).double()
    arch, x = arch_of(own), random_images(arch_of(own), 1)
    assert (arch.norm, arch.head_norm) == ("rms", "tokens" if "final_norm" in options else "both")
    assert (cost(arch).params, cost(arch).macs) == (num_params(own), counted_macs(build(arch), arch))
    rope, encoder = model.encoder.rope, model.double().encoder
    rope.float()
    embed = rope.get_embed
    rope.get_embed = lambda shape: embed(shape=shape).double()
    for name, norm in [(n, m) for n, m in model.named_modules() if isinstance(m, RmsNormFp32)]:
        exact = RmsNorm(norm.normalized_shape, eps=norm.eps, affine=norm.weight is not None)
        exact.weight = norm.weight
        model.set_submodule(name, exact)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)
    why = family_of(arch).only_chosen(arch, "stages.0.embed")
    assert (why is None) == (arch.head_norm == "tokens")
    encoder.global_pool = "avg"
    assert Arch.from_timm(encoder).head_norm == "tokens"


def test_heads_that_share_keys_and_values_get_their_own() -> None:
    model = small("vit_base_patch16_sapiens2", (32, 48), second=1)
    with pytest.warns(UserWarning, match="in 1 blocks several heads share keys and values"):
        own = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert (arch.qk_norm, arch.norm, arch.layer_scale, arch.mlp_scale) == (True, "rms", True, False)
    assert cost(arch).params == num_params(own) == num_params(model) + 2 * 12 * 25  # of one head's keys and values
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)


def test_timms_own_module_is_refused_with_what_to_do() -> None:
    model = small(*KINDS[0])
    with pytest.raises(UserError, match="give prunesweep.models.adopted"):
        block_views(model)
    assert adopted(adopted(model)) is not model
    taken = adopted(model)
    assert adopted(taken) is taken
    small_one = cut(model, Cut(embed=(tuple(range(12)),), blocks=(BlockCut(),) * 2))  # adopts it
    assert arch_of(small_one).stages[0].width == 12


@pytest.mark.parametrize("kind", ["axial", "centred", "mixed"])
def test_a_cut_keeps_the_frequencies_of_its_pairs(kind: str) -> None:
    """Pairs that stay turn as they did: logits of one head are the sums over them."""
    arch = dataclasses.replace(rotating(kind), k_bias=True)
    model = random_model(arch, 3)
    block = arch.blocks[0]
    kept = ((1, 3), (block.qk, block.qk + 2))
    decision = Cut(blocks=(BlockCut(qk=kept, v=((0, 1), (block.v, block.v + 1))), *[BlockCut()] * (arch.depth - 1)))
    own = cut(model, decision)
    whole, narrow = (block_views(m)[0].attention for m in (model, own))
    assert whole is not None
    assert narrow is not None
    x = torch.randn(2, arch.tokens, arch.stages[0].width, dtype=torch.float64)
    q, k, _ = whole.queries_keys_values(x)
    turned = [whole.turned(whole.by_head(part)) for part in (q, k)]
    pairs = torch.tensor([[1, 3], [0, 2]])
    wanted = [
        torch.stack([part[:, h][..., torch.cat([own, own + block.qk])] for h, own in enumerate(pairs)], 1)
        for part in turned
    ]
    q, k, _ = narrow.queries_keys_values(x)
    for part, want in zip((q, k), wanted, strict=True):
        torch.testing.assert_close(narrow.turned(narrow.by_head(part)), want, rtol=1e-6, atol=1e-6)


def rotating(kind: str) -> Arch:
    for seed in range(1000):
        arch = random_eva(Random(seed), ragged=False, missing=False, extras=False)
        block = arch.blocks[0]
        fits = block.heads == 2 and block.qk == 4 and isinstance(block.v, int) and not arch.qk_norm
        if arch.rope is not None and arch.rope.kind == kind and fits:
            return arch
    raise AssertionError(kind)


def test_turned_logits_depend_on_distances_alone() -> None:
    """With one direction per pair, logits of equal tokens are functions of the difference of their places."""
    arch = rotating("axial")
    arch = dataclasses.replace(arch, rope=dataclasses.replace(arch.rope, reference=None))
    view = block_views(random_model(arch, 0))[0].attention
    assert view is not None
    columns, prefix = arch.stages[0].grid[1], arch.prefix_tokens
    token = torch.randn(1, 1, arch.stages[0].width, dtype=torch.float64).expand(1, arch.tokens, -1)
    q, k, _ = view.queries_keys_values(token)
    q, k = view.turned(view.by_head(q)), view.turned(view.by_head(k))
    logits = (q @ k.mT)[0, 0, prefix:, prefix:].unflatten(0, (-1, columns)).unflatten(2, (-1, columns))
    torch.testing.assert_close(logits[0, 0, 1, 1], logits[-2, -2, -1, -1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[0, 0, 0, 1], logits[0, 0, 1, 0])
    torch.testing.assert_close(view.by_head(view.q(token))[:, :, :prefix], q[:, :, :prefix])  # these are not turned


def test_places_are_rows_and_columns_or_lie_between_their_ends() -> None:
    plain = place_coordinates(Rope(kind="axial", pairs=4, temperature=10.0), (2, 3))
    assert plain.tolist() == [[r, c] for r in range(2) for c in range(3)]
    swapped = place_coordinates(Rope(kind="axial", pairs=4, temperature=10.0, column_first=True, offset=1.0), (2, 3))
    assert swapped.tolist() == [[c + 1, r + 1] for r in range(2) for c in range(3)]
    scaled = place_coordinates(Rope(kind="axial", pairs=4, temperature=10.0, reference=(4, 6)), (2, 3))
    assert scaled.tolist() == [[2 * r, 2 * c] for r in range(2) for c in range(3)]
    centred = place_coordinates(Rope(kind="centred", pairs=4, temperature=100.0), (2, 4))
    assert centred.tolist() == [[r, c] for r in (-0.5, 0.5) for c in (-0.75, -0.25, 0.25, 0.75)]


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_a_merged_token_has_the_mean_place_of_its_members(form: str) -> None:
    rope = Rope(kind="axial", pairs=2, temperature=10.0)
    plan = TokenPlan(4, (0, 1, 1, -1, 2, 3, 3), (1.0, 1.0, 3.0, 0.0, 2.0, 1.0, 1.0), form)
    places = Places(rope, (2, 3))
    merge = make_merge(form, 7, 4, 1)
    merge.load_state_dict(plan.tensors())
    found = merged_places(merge, places.coordinates, 1)
    assert found.tolist() == [[0, 0.75], [1, 0], [1, 1.5]]


@pytest.mark.parametrize("kind", ["axial", "centred", "mixed"])
def test_a_plan_that_merges_nothing_changes_nothing(kind: str) -> None:
    arch = rotating(kind)
    model, x = random_model(arch, 1), random_images(arch, 1)
    tokens = arch.tokens
    plan = TokenPlan(tokens, tuple(range(tokens)), (1.0,) * tokens)
    planned = cut(model, Cut(blocks=tuple(BlockCut(tokens=plan) for _ in arch.blocks)))
    with torch.no_grad():
        torch.testing.assert_close(planned(x), model(x), rtol=1e-6, atol=1e-6)


def test_another_image_size_turns_by_another_grid() -> None:
    model = small("eva02_tiny_patch14_224", (28, 42), torch.float32)
    own = adopted(model)
    for sized in (model, own):
        sized.set_input_size((42, 56))
    arch = arch_of(own)
    assert arch.stages[0].grid == (3, 4)
    x = random_images(arch, 0, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(cut(own, Cut(blocks=(BlockCut(),) * 2))(x), own(x))


def test_half_precision_keeps_coordinates() -> None:
    places = Places(Rope(kind="mixed", pairs=4, temperature=10.0), (2, 300))
    assert places.bfloat16().coordinates[-1].tolist() == [1.0, 299.0]


def test_impossible_rotations_are_refused() -> None:
    arch = rotating("axial")
    for change, reason in (
        ({"kind": "spiral"}, "rope.kind = 'spiral'"),
        ({"pairs": 3}, "must be even"),
        ({"temperature": 0.0}, "must be above 0"),
    ):
        with pytest.raises(UserError, match=reason):
            dataclasses.replace(arch, rope=dataclasses.replace(arch.rope, **change)).validate()
    with pytest.raises(UserError, match="rope"):
        dataclasses.replace(arch, family="vit").validate()


def test_learned_frequencies_do_not_decay() -> None:
    model = random_model(rotating("mixed"), 0)
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    kept = {id(p) for p in groups[0]["params"]}
    assert groups[0]["weight_decay"] == 0
    assert all(id(p) in kept for name, p in model.named_parameters() if name.endswith("freqs"))


def test_gated_mlps_of_vits() -> None:
    """DINOv2-g's: one layer with two rows for a unit."""
    model = timm.create_model("vit_giant_patch14_dinov2", img_size=28, **SMALL).eval()
    arch = arch_of(model)
    assert arch.family == "vit"
    assert arch.glu
    assert arch.act == "silu"
    units = arch.blocks[0].mlp
    assert model.blocks[0].mlp.fc1.out_features == 2 * units
    narrow = cut(model, Cut(blocks=(BlockCut(mlp=(0, 3, 4)), BlockCut())))
    assert torch.equal(
        narrow.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight[[0, 3, 4, units, units + 3, units + 4]]
    )
    assert all(a <= b for a, b in pairwise([cost(arch_of(narrow)).params, cost(arch).params]))
