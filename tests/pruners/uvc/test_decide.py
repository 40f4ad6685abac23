from __future__ import annotations

import pytest
import torch

from prunesweep.models import UserError, cost, cut_arch
from prunesweep.pruners.uvc.control import NormalizedPrimalDual
from prunesweep.pruners.uvc.decide import Counts, Decider
from prunesweep.pruners.uvc.resource import Resource
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.pruners.nvit.test_schedule import vit
from tests.pruners.uvc.test_primal_dual import random_norms

ARCH = vit(depth=3, width=24, heads=4, head=6, mlp=30)
TOTAL = cost(ARCH).macs


def decided(seed: int, r_mode: str, align: int = 1):
    """A decider, widths at random, and their counts."""
    machine = NormalizedPrimalDual(Resource.of(ARCH, "exact"), UVCSettings())
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, top: int) -> torch.Tensor:
        return top * torch.rand(shape, generator=generator, dtype=torch.float64)

    machine.s = torch.stack([draw(3, top=3), draw(3, top=29)], 1)
    machine.r = draw(3, 4, top=5)
    norms = random_norms(ARCH, seed)
    counts = Counts.of(machine, norms, r_mode=r_mode, mlp_align=align)
    return Decider(ARCH, norms, r_mode=r_mode, mlp_align=align), counts, norms


@pytest.mark.parametrize("r_mode", ["uniform", "ragged", "off"])
@pytest.mark.parametrize("seed", range(4))
def test_any_decision_comes_within_one_unit_of_any_budget(r_mode: str, seed: int) -> None:
    decider, counts, _ = decided(seed, r_mode, align=4)
    start = decider.widths(counts)
    runs = [True] * 3
    low = decider.least(runs)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        budget = low + share * (TOTAL - low)
        widths, alive = decider.fit(start, runs, budget)
        small = cut_arch(ARCH, decider.cut(widths, alive))
        assert alive == runs
        assert cost(small).macs == decider.macs(widths, runs) <= budget
        for block, own in enumerate(widths):  # nothing that fits is left out
            assert all(cost(small).macs + macs > budget for _, _, macs in decider.moves(block, own, True))
            assert own.mlp % 4 == 0 or own.mlp == 30
        if r_mode != "ragged":
            assert all(isinstance(block.v, int) for block in small.blocks)
        if r_mode == "off":
            assert all(block.stock_heads or block.scale == 0.5 for block in small.blocks)
            assert all(block.v == block.qk for block in small.blocks)


@pytest.mark.parametrize("r_mode", ["uniform", "ragged", "off"])
def test_masks_counts_and_cut_say_the_same(r_mode: str) -> None:
    decider, counts, norms = decided(1, r_mode, align=4)
    widths = decider.widths(counts)
    decision = decider.cut(widths, [True] * 3)
    for choice, columns, units in zip(decision.blocks, *counts.masks(norms), strict=True):
        assert [c for head in choice.v for c in head] == columns.nonzero()[:, 0].tolist()
        assert list(choice.mlp) == units.nonzero()[:, 0].tolist()
    runs = torch.tensor([True, False, True])
    exact = cost(cut_arch(ARCH, decider.cut(widths, runs.tolist()))).macs
    assert counts.macs(ARCH, runs) == decider.macs(widths, runs.tolist()) == exact


def test_what_goes_is_the_least_norm_per_mac() -> None:
    """Of equal blocks but for their norms, the one whose last units are weakest loses them."""
    decider, _, norms = decided(0, "off")
    norms.mlp[1] = norms.mlp[1].sort().values ** 4  # many weak units, few strong ones
    decider = Decider(ARCH, norms, r_mode="off", mlp_align=1)
    counts = Counts.of(
        NormalizedPrimalDual(Resource.of(ARCH, "exact"), UVCSettings()), norms, r_mode="off", mlp_align=1
    )
    widths, _ = decider.fit(decider.widths(counts), [True] * 3, 0.85 * TOTAL)
    assert widths[1].mlp < min(widths[0].mlp, widths[2].mlp)
    kept = decider.cut(widths, [True] * 3).blocks[1].mlp
    assert list(kept) == list(range(30 - len(kept), 30))


def test_blocks_go_or_come_back_only_where_widths_cannot_do_it() -> None:
    decider, counts, _ = decided(0, "uniform")
    start, order = decider.widths(counts), [1, 0, 2]
    three = decider.least([True] * 3)
    assert decider.fit(start, [True] * 3, three, order)[1] == [True, True, True]
    assert decider.fit(start, [True] * 3, three - 1, order)[1] == [True, False, True]
    assert decider.fit(start, [False, False, True], 0.9 * TOTAL, order)[1] == [True, True, True]
    with pytest.raises(UserError, match="cannot be reached with 3 blocks: at their narrowest they have"):
        decider.fit(start, [True] * 3, three - 1)
