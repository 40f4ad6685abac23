"""BEiT and ViTs with relative position bias: the full record is the same function, and what biases do not allow."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.models._registry import _model_to_module
from timm.optim import param_groups_weight_decay
from torch import nn

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
    num_params,
)
from prunesweep.models.families import family_of
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.models.tome import apply_tome
from prunesweep.models.without_values import without_values
from tests.generate import random_beit, random_images, random_model

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("beit_base_patch16_224", {"img_size": (32, 48)}, "table"),
    ("beit_base_patch16_224", {"scale_mlp": True, "swiglu_mlp": True, "use_abs_pos_emb": True}, "table"),
    ("beitv2_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, "table"),
    ("vit_relpos_small_patch16_224", {"rel_pos_type": "bias", "class_token": True}, "table"),
    ("vit_relpos_base_patch16_clsgap_224", {"img_size": (32, 48)}, "mlp"),
    ("vit_relpos_medium_patch16_cls_224", {}, "mlp"),
    ("vit_srelpos_small_patch16_224", {}, "mlp"),
    ("vit_relpos_medium_patch16_rpn_224", {}, "mlp"),
]


def small(name: str, **options: Any) -> Any:
    """A narrow timm model with random norms, biases and tables."""
    model = timm.create_model(name, **{"img_size": 48, **SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.double()


@pytest.mark.parametrize(("name", "options", "kind"), KINDS)
def test_an_adopted_model_is_the_same_function(name: str, options: dict[str, Any], kind: str) -> None:
    model = small(name, **options)
    own = adopted(model)
    arch, x = arch_of(own), random_images(Arch.from_timm(model), 1)
    assert Arch.from_json(arch.to_json()) == arch
    assert arch.position_bias is not None
    assert arch.position_bias.kind == kind
    assert cost(arch).params == num_params(own)
    shared = "srelpos" in name or options.get("use_shared_rel_pos_bias")  # one for all becomes one for every block
    assert (num_params(own) == num_params(model)) != bool(shared)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-12, atol=1e-12)


def test_every_published_name_is_read() -> None:
    """An empty timm model's weights are those of the record's, by name and shape."""
    found = {name.split(".")[0] for name in timm.list_pretrained()}
    names = sorted(name for name in found if _model_to_module[name] in ("beit", "vision_transformer_relpos"))
    for name in names:
        with without_values():
            model = timm.create_model(name, depth=2)
            arch = Arch.from_timm(model)
            own, given = build(arch).state_dict(), family_of(arch).adopted(model, arch)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in given.items()}, name
    assert len(names) == 16


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_base_patch16_clsgap_224"])
def test_another_image_size_has_biases_of_another_grid(name: str) -> None:
    model = small(name)
    own = adopted(model)
    for sized in (model, own):
        sized.set_input_size((48, 64))
    arch = arch_of(own)
    assert arch.stages[0].grid == (3, 4)
    assert cost(arch).params == num_params(own)
    x = random_images(arch, 0)
    with torch.no_grad():
        torch.testing.assert_close(own(x), model(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cut(own, Cut(blocks=(BlockCut(),) * 2))(x), own(x))


def test_heads_keep_their_biases() -> None:
    model: Any = adopted(small("beit_base_patch16_224"))
    table = model.blocks[0].attn.rel_pos.relative_position_bias_table
    second = BlockCut(qk=(tuple(range(12, 18)),), v=(tuple(range(12, 24)),))
    narrow: Any = cut(model, Cut(blocks=(second, BlockCut())))
    assert torch.equal(narrow.blocks[0].attn.rel_pos.relative_position_bias_table, table[:, 1:])
    both = BlockCut(qk=((0, 12), (13, 14)), v=((0,), (12,)))
    with pytest.raises(UserError, match="a head has position biases of its own; keep channels of one head"):
        cut(model, Cut(blocks=(both, BlockCut())))


def test_nothing_merges_tokens_between_which_there_are_biases() -> None:
    arch = random_beit(Random(1), ragged=False, missing=False, extras=False)
    model = random_model(arch, 0)
    plan = TokenPlan(arch.tokens, tuple(range(arch.tokens)), (1.0,) * arch.tokens)
    with pytest.raises(UserError, match="family 'beit' takes no token plan"):
        cut(model, Cut(blocks=(BlockCut(tokens=plan), *[BlockCut()] * (arch.depth - 1))))
    with pytest.raises(UserError, match="ToMe: random is of family 'beit'"):
        apply_tome(model, 1)
    with pytest.raises(UserError, match="has biases for all places"):
        family_of(arch).set_patch_drop_rate(model, arch, 0.5)
    with pytest.raises(UserError, match="position biases for one grid"):
        family_of(arch).make_dynamic(model, arch)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (None, "needs position_bias"),
        (PositionBias(kind="cosine"), "position_bias.kind = 'cosine': must be one of table, mlp"),
        (PositionBias(kind="mlp"), "position_bias.hidden = 0: must be a whole number of at least 1"),
        (PositionBias(kind="table", hidden=3), "has no hidden units"),
    ],
)
def test_impossible_biases_are_refused(bias: PositionBias | None, message: str) -> None:
    arch = random_beit(Random(1), ragged=False, missing=False, extras=False)
    data = {**arch.to_dict(), "position_bias": bias and {"kind": bias.kind, "hidden": bias.hidden}}
    with pytest.raises(UserError, match=message):
        Arch.from_dict(data)


def test_tables_do_not_decay() -> None:
    model: Any = adopted(small("beit_base_patch16_224"))
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    free = {id(p) for p in groups[0]["params"]}
    tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert groups[0]["weight_decay"] == 0
    assert len(tables) == 2
    assert all(isinstance(p, nn.Parameter) and id(p) in free for p in tables)
