from __future__ import annotations

from random import Random

import pytest
import torch

from prunesweep.models import Arch, BlockCut, Cut, cost, cut_arch
from prunesweep.pruners.uvc.resource import Resource, paper_macs
from tests.pruners.nvit.test_schedule import vit


def deit(size: str) -> Arch:
    return Arch.from_timm(f"deit_{size}_patch16_224")


def at(resource: Resource, s=0.0, units=0.0, r=0.0, pi=None):
    """R where every block loses ``s`` heads, the first ones, ``units`` MLP units and ``r`` channels of every head."""
    L, H = len(resource.heads), resource.num_heads
    counts = torch.tensor([[s, units]], dtype=torch.float64).repeat(L, 1)
    channels = torch.full((L, H), float(r), dtype=torch.float64)
    gone = torch.arange(H)[None].repeat(L, 1) < counts[:, :1].ceil()
    return resource(counts, channels, torch.ones(L, dtype=torch.float64) if pi is None else pi, gone)


# total MACs; percent of: embedding, block, head, value channel, MLP unit, narrowest block; attention's share of a block
TABLE = {
    "tiny": (1_253_491_200, 2.3057, 8.1412, 1.1688, 0.00611, 0.00603, 0.790, 0.431),
    "small": (4_598_498_304, 1.2570, 8.2286, 0.5292, 0.00249, 0.00329, 0.376, 0.386),
    "base": (17_563_060_224, 0.6582, 8.2785, 0.2488, 0.00108, 0.00172, 0.182, 0.361),
}


@pytest.mark.parametrize("size", TABLE)
def test_unit_costs_of_deit(size: str) -> None:
    arch = deit(size)
    total, embed, block, head, channel, unit, least, attention = TABLE[size]
    count, macs = paper_macs(arch)
    assert count + int(macs.sum()) == total
    resource = Resource.of(arch, "paper")
    dense, L, H = at(resource), arch.depth, resource.num_heads
    assert dense.value == pytest.approx(1, abs=1e-14)
    assert 100 * resource.fixed == pytest.approx(embed, abs=1e-4)
    assert (100 * dense.pi).tolist() == pytest.approx([block] * L, abs=1e-4)
    assert (-100 * dense.s[:, 0]).tolist() == pytest.approx([head] * L, abs=1e-4)
    assert (-100 * dense.s[:, 1]).tolist() == pytest.approx([unit] * L, abs=1e-5)
    assert (-100 * dense.r).flatten().tolist() == pytest.approx([channel] * L * H, abs=1e-5)
    narrowest = at(resource, H - 1, resource.hidden - 1, resource.head_dim - 1)
    assert (100 * narrowest.pi).tolist() == pytest.approx([least] * L, abs=1e-3)
    assert float((resource.heads + resource.values)[0] / dense.pi[0]) == pytest.approx(attention, abs=1e-3)


def test_skipped_blocks_cost_what_the_published_runs_print() -> None:
    """DeiT-S without blocks 8 and 10; the steps of DeiT-B's log."""
    runs = torch.ones(12, dtype=torch.float64)
    runs[[8, 10]] = 0
    assert at(Resource.of(deit("small"), "paper"), pi=runs).value == pytest.approx(0.83543, abs=1e-5)
    base = Resource.of(deit("base"), "paper")
    logged = {11: 91.7215, 10: 83.4430, 6: 50.3291, 5: 42.0506, 4: 33.7722, 3: 25.4937, 2: 17.2152, 1: 8.9367}
    for count, percent in logged.items():
        runs = (torch.arange(12) < count).double()
        assert 100 * at(base, pi=runs).value == pytest.approx(percent, abs=1e-3)


def test_the_gradient_at_the_start_is_that_of_the_inside() -> None:
    """s = r = 0 is a bound of every share: autograd through clamp may be zero there, and nothing would be pruned."""
    usage = at(Resource.of(vit(), "exact"))
    assert (usage.s < 0).all()
    assert (usage.r < 0).all()
    assert (usage.pi > 0).all()


def test_the_gradient_is_that_of_a_whole_unit() -> None:
    """R is piecewise linear in whole units: one more of anything changes it by exactly its gradient."""
    resource = Resource.of(vit(width=16, mlp=24), "exact")
    pi = torch.tensor([0.7, 0.3], dtype=torch.float64)
    here = at(resource, pi=pi)
    assert at(resource, s=1, pi=pi).value - here.value == pytest.approx(float(here.s[:, 0].sum()), rel=1e-12)
    assert at(resource, units=5, pi=pi).value - here.value == pytest.approx(5 * float(here.s[:, 1].sum()), rel=1e-12)
    assert at(resource, r=2, pi=pi).value - here.value == pytest.approx(2 * float(here.r.sum()), rel=1e-12)
    one = at(resource, s=1, pi=pi)
    assert (one.r[:, 0] == 0).all()  # a head that goes has no channels to lose
    assert (one.r[:, 1:] < 0).all()
    beyond = at(resource, s=resource.num_heads, units=resource.hidden + 1, pi=pi)
    assert (beyond.s[:, 1] == 0).all()
    assert beyond.value == pytest.approx(resource.fixed, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_count_is_that_of_the_cut_model(seed: int) -> None:
    random, arch = Random(seed), vit(width=16, mlp=24)
    resource, block = Resource.of(arch, "exact"), arch.blocks[0]
    E, H = block.qk, block.heads
    choices, s, r, pi = [], [], [], []
    for _ in arch.blocks:
        heads, units = random.randrange(H), random.randrange(block.mlp)
        channels = [random.randrange(E) for _ in range(H)]
        kept = range(heads, H)
        qk = tuple(tuple(range(h * E, (h + 1) * E)) for h in kept)
        v = tuple(tuple(range(h * E + channels[h], (h + 1) * E)) for h in kept)
        choices.append(BlockCut(qk=qk, v=v, mlp=tuple(range(units, block.mlp))))
        # real numbers count as the next whole ones
        s.append([max(heads - 0.3, 0), max(units - 0.9, 0)])
        r.append([max(c - 0.5, 0) for c in channels])
        pi.append(1.0)
    skipped = random.randrange(len(choices) + 1)
    if skipped < len(choices):
        choices[skipped], pi[skipped] = BlockCut(keep=False), 0.0
    s, r, pi = (torch.tensor(x, dtype=torch.float64) for x in (s, r, pi))
    found = resource(s, r, pi, torch.arange(H)[None] < s[:, :1].ceil()).value
    assert found == pytest.approx(cost(cut_arch(arch, Cut(blocks=tuple(choices)))).macs / cost(arch).macs, rel=1e-12)
