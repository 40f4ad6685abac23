from __future__ import annotations

import timm
import torch
from torch import nn

from prunesweep.models import arch_of
from prunesweep.pruners import Scores, WidthMethod, get_method
from prunesweep.pruners.zeros import zero_notes
from tests.contract_pruner import labelled


def vit(**options: float) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **shape, **options)


def scored(model: nn.Module, method: str = "taylor") -> Scores:
    return get_method(method, WidthMethod).score(model, labelled(arch_of(model), 0, torch.float32))


def test_a_layer_scale_of_zero_is_the_reason() -> None:
    model = vit(init_values=0.1)
    assert zero_notes(model, scored(model)) == []
    with torch.no_grad():
        for block in (0, 2):
            model.blocks[block].ls2.gamma.zero_()
        model.blocks[1].ls1.gamma.zero_()
    reason = "their branch has a LayerScale of 0; nothing tells these units apart, they go first"
    assert sorted(zero_notes(model, scored(model))) == [
        f"scores of 'attn' are all 0 in blocks.1: {reason}",
        f"scores of 'mlp' are all 0 in blocks.0, blocks.2: {reason}",
    ]


def test_weights_of_zero_are_the_reason() -> None:
    model = vit()
    with torch.no_grad():
        for p in model.blocks[1].mlp.parameters():
            p.zero_()
    for method in ("taylor", "magnitude"):
        (note,) = zero_notes(model, scored(model, method))
        assert note.startswith("scores of 'mlp' are all 0 in blocks.1: all of their weights are 0; nothing tells")


def test_units_behind_a_dead_head_do_not_matter() -> None:
    model = vit()
    with torch.no_grad():
        model.head.weight.zero_()
    notes = zero_notes(model, scored(model))
    assert any(
        "'mlp' are all 0 in blocks.0, blocks.1, blocks.2: the output does not depend on them" in n for n in notes
    )


def test_magnitude_of_a_living_model_has_no_zeros() -> None:
    model = vit()
    assert zero_notes(model, scored(model, "magnitude")) == []
