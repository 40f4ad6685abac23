"""Views say of every family's blocks what their modules compute, and name their tensors rightly."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from prunesweep.models import BlockView, arch_of, block_views
from prunesweep.models.families import FamiliesWith
from prunesweep.models.families.views import AttentionView
from tests.generate import FAMILIES, random_arch, random_images, random_model

by_family = pytest.mark.parametrize("family", [*FAMILIES, "lm"])


@by_family
@pytest.mark.parametrize("seed", range(8))
def test_views_compute_what_the_modules_do(family: str, seed: int) -> None:
    model = random_model(random_arch(Random(seed), family), seed).double().eval()
    arch, views = arch_of(model), block_views(model)
    seen = watch(model)
    x = random_images(arch, seed)
    model(x.double() if x.is_floating_point() else x)
    for block in views:
        rows = arch.stages[block.stage].grid[0]
        if block.mlp is not None:
            inputs, output = seen[block.mlp.module]
            torch.testing.assert_close(block.mlp.out(block.mlp.hidden(inputs, rows)), output)
        if block.attention is not None and not block.record.shifted:
            inputs, output = seen[block.attention.module]
            torch.testing.assert_close(run(block.attention, inputs, rows, causal=arch.text is not None), output)


def watch(model: nn.Module) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every module in the passes to come."""
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs:
            seen[module] = inputs[0], output

    for module in model.modules():
        module.register_forward_hook(keep)
    return seen


def run(attention: AttentionView, x: torch.Tensor, rows: int, *, causal: bool) -> torch.Tensor:
    record, source = attention.record, x
    if attention.reduction is not None:
        source = attention.reduction.read(x, rows)
    q, (k, v) = attention.queries(x), attention.keys_values(source)
    if attention.reduction is None:
        for one, other in zip((q, k, v), attention.queries_keys_values(x), strict=True):
            torch.testing.assert_close(one, other)
    q, k = attention.q_norm(attention.by_head(q)), attention.k_norm(attention.by_head(k))
    q, k = attention.turned(q), attention.turned(k)
    bias = None if attention.bias is None else attention.bias()
    if attention.windows is not None:
        bias = attention.windows.logit_bias(len(x))
    mixed = attention.attend(q, k, v, record.v_widths, record.scale, is_causal=causal, attn_mask=bias)
    return attention.out(attention.out_norm(mixed))


@pytest.mark.parametrize("family", [*(family for family in FAMILIES if family != "xcit"), "lm"])  # it has no such view
def test_views_name_tensors_and_share_memory(family: str) -> None:
    arch = random_arch(Random(3), family, missing=False, extras=False)
    model = random_model(arch, 3)
    state = model.state_dict()
    assert any(block.mixer == "attn" for block in arch.blocks)
    for block in block_views(model):
        assert model.get_submodule(block.name) is block.module
        assert (block.attention is not None) == (block.record.mixer == "attn")
        if block.attention is None:
            continue
        assert block.mlp is not None
        check_names(block, state)
        rows = {view.name: view.layer.weight for view in block.attention.inputs}
        parts = (block.attention.q, block.attention.k, block.attention.v)
        for part, own in zip(parts, block.attention.split(rows), strict=True):
            assert torch.equal(own, part.weight)
        assert sum(len(own) for own in block.attention.split(rows)) == sum(map(len, rows.values()))


def check_names(block: BlockView, state: dict[str, torch.Tensor]) -> None:
    assert block.attention is not None
    assert block.mlp is not None
    for view in (*block.attention.inputs, block.attention.out, *block.mlp.inputs, block.mlp.out):
        assert state[f"{block.name}.{view.weight_name}"].data_ptr() == view.weight.data_ptr()
        if view.bias is None:
            assert f"{block.name}.{view.bias_name}" not in state
        else:
            assert state[f"{block.name}.{view.bias_name}"].data_ptr() == view.bias.data_ptr()
    assert block.module.get_submodule(block.mlp.act_name) is block.mlp.act
    assert block.module.get_submodule(block.attention.name) is block.attention.module


def test_families_are_found_by_what_they_can() -> None:
    whole = [family for family in FAMILIES if family != "pvt_v2"]
    assert list(FamiliesWith("images", without={"spatial_reduction": "reduced"})) == whole
    without = ["vit", "eva", "beit", "diff", "cait", "xcit", "pvt_v2", "pit", "metaformer", "lm"]
    assert list(FamiliesWith("width", without={"windows": "within windows"})) == without
    assert "lm" not in FamiliesWith("images")
    with pytest.raises(KeyError, match="swimming"):
        FamiliesWith("swimming")
