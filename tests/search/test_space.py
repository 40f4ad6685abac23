from __future__ import annotations

import itertools

import pytest
import torch

from models import Arch, UserError, cost
from pruners import GROUP_SIZES, Scores, vector_sizes
from pruners.nvit import KINDS
from search.config import SpaceTable
from search.space import Space
from tests.search.helpers import ARCH, make_space

GROUPS = {**GROUP_SIZES, "embed": 4, "heads": 1, "qk": 4, "v": 4, "mlp": 8}


def test_a_point_decodes_to_the_same_architecture_within_its_budget() -> None:
    space, again = make_space(), make_space()
    source = cost(ARCH).macs
    for budget, skip in itertools.product((0.3, 0.45, 0.6, 0.9), (0, 1, 2)):
        point = {"budget": budget, "skip": skip, "lr": 1e-3}
        found = space.decode(point)
        assert found.arch == again.decode(point).arch
        assert found.cost == cost(found.arch)
        assert found.cost.macs <= budget * source
        assert ARCH.depth - found.arch.depth == skip


def test_blocks_go_in_the_order_of_their_importance() -> None:
    space = make_space()
    kept = [b.src for b in space.decode({"budget": 0.9, "skip": 2, "lr": 1e-3}).arch.stages[0].blocks]
    assert kept == [0, 3]  # importance 9, 1, 2, 5


def test_number_of_architectures_is_exact() -> None:
    space = make_space(budget=(0.35, 0.8))
    source = cost(ARCH).macs
    seen = set()
    for skip, path in space.paths.items():
        inside = [m / source for m in path.costs if 0.35 <= m / source <= 0.8]
        for budget in [0.35, 0.8, *inside]:
            seen.add(space.decode({"budget": budget, "skip": skip, "lr": 1e-3}).arch)
    widths = {(a.stages, a.depth) for a in seen}
    assert space.count_architectures() >= len(widths)
    steps = {(skip, path.step_for(b * source)) for skip, path in space.paths.items() for b in grid(0.35, 0.8)}
    assert space.count_architectures() == len(steps)


def grid(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / 20000 for i in range(20001)]


def test_summary_is_reproducible_and_within_the_window() -> None:
    space = make_space()
    summary = space.summarise(100, seed=3)
    assert summary == space.summarise(100, seed=3)
    assert summary != space.summarise(100, seed=4)
    assert summary.feasible == 1
    assert summary.macs.low <= summary.macs.median <= summary.macs.high <= 0.9 * cost(ARCH).macs
    assert len(summary.points) == 100
    low, high = space.reachable
    assert low < 0.1
    assert 0.7 < high <= 0.9


def test_a_partly_reachable_window_says_how_much() -> None:
    coarse = {"embed": 0, "heads": 0, "qk": 0, "v": 0, "mlp": 8}
    space = make_space(budget=(0.3, 0.9), groups=coarse)
    summary = space.summarise(200, seed=0)
    assert 0 < summary.feasible < 1
    with pytest.raises(UserError, match="cannot be reached with 0 blocks dropped"):
        space.decode({"budget": 0.3, "skip": 0, "lr": 1e-3})


def test_an_unreachable_window_is_refused_before_any_scoring() -> None:
    table = SpaceTable(budget=(0.01, 0.02), groups={"embed": 0, "heads": 0, "qk": 0, "v": 0, "mlp": 8})
    with pytest.raises(UserError, match="cannot be met: the narrowest model still has"):
        Space.check(table, ARCH, "nvit")


def test_at_least_one_block_must_stay() -> None:
    with pytest.raises(UserError, match=r"space.skip = \[0, 4\]: the source has 4 blocks"):
        make_space(skip=(0, 4))


def test_deit_base_is_solved_in_well_under_a_second() -> None:
    """Not a timing test: the path of the largest usual source is complete and every budget hits."""
    arch = Arch.from_timm("deit_base_patch16_224")
    ones = Scores({name: torch.rand(size, dtype=torch.float64) for name, size in vector_sizes(arch, KINDS).items()})
    space = Space(SpaceTable(), arch, ones, Scores({"depth": torch.arange(12.0)}))
    found = space.decode({"budget": 0.39, "skip": 0, "lr": 1e-3})
    assert 0.37 < found.cost.macs / cost(arch).macs <= 0.39
