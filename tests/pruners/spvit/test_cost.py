from __future__ import annotations

from random import Random

import pytest
import torch

from prunesweep.models import Arch, cost, cut_arch
from prunesweep.models.published.archs import deit, swin
from prunesweep.models.published.comparison import published_arch
from prunesweep.models.published.counts import SPVIT
from prunesweep.pruners.spvit.choices import spvit_cut
from prunesweep.pruners.spvit.cost import COUNTS, complexity_loss, gate_costs, has_mixer_gates
from prunesweep.pruners.spvit.gates import CHOICES
from tests.generate import random_arch, subset

LETTERS = {"attn": "msa", "none": "skip"}


def random_decision(random: Random, arch: Arch) -> tuple[list[str], list[tuple[int, ...] | None]]:
    choices = [random.choice(CHOICES) if has_mixer_gates(block) else "msa" for block in arch.blocks]
    return choices, [subset(random, block.mlp) if block.mlp else None for block in arch.blocks]


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("seed", range(15))
def test_costs_are_those_of_the_record_that_the_decision_makes(family: str, seed: int) -> None:
    """Exact and SPViT's own count; blocks that have a mixer, a token plan or ragged heads already keep them."""
    random = Random(seed)
    arch = random_arch(random, family)
    choices, units = random_decision(random, arch)
    small = cut_arch(arch, spvit_cut(arch, choices, units))
    kept = [len(own or ()) for own in units]
    for count in COUNTS.values():
        costs = gate_costs(arch, count)
        assert costs.total(choices, kept) == count(small)
        opened = [CHOICES.index(c) for c in choices]
        mixers = [(torch.arange(3) < n).float() if own else None for n, own in zip(opened, costs.mixers, strict=True)]
        masks = [torch.arange(block.mlp) < n if block.mlp else None for block, n in zip(arch.blocks, kept, strict=True)]
        assert costs.estimate(mixers, masks).item() == count(small)


@pytest.mark.parametrize(
    ("arch", "block", "want"),
    [  # MMACs of 1x1, 3x3, attention, and the MLP at full width
        (deit("tiny"), 0, (4.82, 24.08, 43.95, 57.80)),
        (deit("small"), 5, (9.63, 48.17, 146.0, 231.2)),
        (deit("base"), 11, (19.27, 96.34, 524.4, 924.8)),
        (swin("tiny"), 0, (19.3, 96.3, 145.1, 231.2)),
        (swin("small"), 2, (9.6, 48.2, 130.4, 231.2)),
        (swin("base"), 10, (6.4, 32.1, 215.4, 411.0)),
        (swin("base"), 23, (3.2, 16.1, 210.4, 411.0)),
    ],
)
def test_figures_of_dense_models(arch: Arch, block: int, want: tuple[float, ...]) -> None:
    costs = gate_costs(arch, COUNTS["reference"])
    mixers = costs.mixers[block]
    assert mixers is not None
    found = (*mixers, costs.units[block] * arch.blocks[block].mlp)
    assert [mac / 1e6 for mac in found] == pytest.approx(want, rel=0, abs=0.06)


SHIPPED = {
    "spvit_deit_tiny": deit("tiny"),
    "spvit_deit_small": deit("small"),
    "spvit_deit_base": deit("base"),
    "spvit_deit_base_11g7": deit("base"),
    "spvit_swin_tiny": swin("tiny"),
    "spvit_swin_small": swin("small"),
    "spvit_swin_base": swin("base"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_cut_of_the_dense_model_is_the_shipped_architecture(name: str) -> None:
    """Figures of the shipped records are checked in tests/models/test_published.py."""
    dense, shipped = SHIPPED[name], published_arch(name)
    choices = [LETTERS.get(block.mixer, block.mixer) for block in shipped.blocks]
    widths = [block.mlp for block in shipped.blocks]
    found = cut_arch(dense, spvit_cut(dense, choices, [range(m) for m in widths], skip_form="ln_residual"))
    assert found == shipped
    assert gate_costs(dense, COUNTS["reference"]).total(choices, widths) == SPVIT.macs(shipped)
    assert gate_costs(dense).total(choices, widths) == cost(shipped).macs


def test_the_penalty_is_squared_and_one_sided_on_demand() -> None:
    shares = torch.tensor([0.5, 0.9], dtype=torch.float64, requires_grad=True)
    for form, values, slopes in (("hinge", [0, 0.9], [0, 6.0]), ("two_sided", [0.1, 0.9], [-2.0, 6.0])):
        loss = complexity_loss(shares, 0.6, 10.0, form)
        assert loss.tolist() == pytest.approx(values)
        (got,) = torch.autograd.grad(loss.sum(), shares)
        assert got.tolist() == pytest.approx(slopes)
