from __future__ import annotations

from random import Random

import pytest
import torch

from prunesweep.models import Arch, BlockCut, UserError, cut_arch
from prunesweep.models.published.archs import deit
from prunesweep.pruners.spvit.choices import fit_units, spvit_cut
from prunesweep.pruners.spvit.cost import gate_costs
from prunesweep.pruners.spvit.gates import CHOICES
from tests.generate import random_arch

TINY = deit("tiny")


def test_choices_become_mixers() -> None:
    choices = ["skip", "conv1x1", "conv3x3", *["msa"] * 9]
    decision = spvit_cut(TINY, choices, [(1, 5), *[None] * 11])
    assert decision.blocks[0] == BlockCut(mixer="none", mlp=(1, 5))
    assert decision.blocks[3] == BlockCut()
    small = cut_arch(TINY, decision)
    assert [block.mixer for block in small.blocks[:4]] == ["none", "conv1x1", "conv3x3", "attn"]
    assert [block.mlp for block in small.blocks[:2]] == [2, 768]
    assert not small.blocks[0].norm_residual
    published = cut_arch(TINY, spvit_cut(TINY, choices, skip_form="ln_residual"))
    assert published.blocks[0].norm_residual


def test_impossible_choices_are_named() -> None:
    msa = ["msa"] * 12
    conv = cut_arch(TINY, spvit_cut(TINY, ["conv1x1", *msa[1:]]))
    for arch, given, message in (
        (TINY, {"choices": msa[1:]}, "choices has 11 entries: .* has 12 blocks, give one"),
        (TINY, {"choices": msa, "mlp": [None]}, "mlp has 1 entries: .* has 12 blocks, give one"),
        (TINY, {"choices": [*msa[1:], "conv5x5"]}, r"choices\[11\] = 'conv5x5': must be one of skip, .*did you mean"),
        (conv, {"choices": ["conv3x3", *msa[1:]]}, r"choices\[0\] = 'conv3x3': block 0 has mixer 'conv1x1'"),
        (TINY, {"choices": msa, "skip_form": "none"}, "skip_form = 'none': must be one of identity, ln_residual"),
        (TINY, {"choices": msa, "mlp": [(0, 768), *[None] * 11]}, r"blocks\[0\].mlp: index 768 is outside 0..767"),
        (
            random_arch(Random(0), "pvt_v2"),
            {"choices": []},
            "of family 'pvt_v2': SPViT serves families vit, eva, beit, diff, cait, swin",
        ),
    ):
        with pytest.raises(UserError, match=message):
            spvit_cut(arch, **given)


def sparse_vit() -> Arch:
    return next(
        a
        for s in range(50)
        if (a := random_arch(Random(s), extras=False)).depth == 3 and all(block.mlp > 5 for block in a.blocks)
    )


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_units_fill_the_budget_by_value(start: float) -> None:
    """From too few and from too many: the budget is met to within one unit, the least valuable ones are missing."""
    arch = sparse_vit()
    costs, generator = gate_costs(arch), torch.Generator().manual_seed(0)
    value = [torch.rand(block.mlp, generator=generator) for block in arch.blocks]
    kept = [own.quantile(1 - start) <= own for own in value]
    choices = ["msa"] * arch.depth
    low, high = (costs.total(choices, [n(block.mlp) for block in arch.blocks]) for n in (lambda _: 1, lambda m: m))
    budget = (low + high) / 2
    units = fit_units(costs, choices, value, kept, budget)
    spent = costs.total(choices, [len(own) for own in units])
    assert budget - max(costs.units) < spent <= budget
    per_mac = [own / unit for own, unit in zip(value, costs.units, strict=True)]
    inside = min(per_mac[i][j] for i, own in enumerate(units) for j in own if j != value[i].argmax())
    outside = max(per_mac[i][j] for i, own in enumerate(units) for j in range(arch.blocks[i].mlp) if j not in own)
    assert inside >= outside
    assert all(int(own.argmax()) in units[i] for i, own in enumerate(value))


def test_mixers_beyond_the_budget_are_an_error() -> None:
    costs = gate_costs(TINY)
    value = [torch.ones(768) for _ in range(12)]
    with pytest.raises(UserError, match=r"budget = 1,000,000 macs: the mixers that were chosen leave"):
        fit_units(costs, ["msa"] * 12, value, [own > 0 for own in value], 1e6)
    assert CHOICES[-1] == "msa"
