from __future__ import annotations

import itertools
from random import Random

import pytest
import torch

from prunesweep.models import Arch, UserError, arch_of, cost
from prunesweep.models.families import FAMILIES
from prunesweep.pruners import GROUP_SIZES, Scores, WidthMethod, drop_order, get_method, score_depth, vector_sizes
from prunesweep.pruners.nvit.saliency import KINDS
from prunesweep.search.config import SpaceTable
from prunesweep.search.space.space import Space, candidate_names
from tests import contract_pruner
from tests.generate import random_arch, random_images, random_model
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


def test_a_budget_counts_what_other_axes_save_and_is_met() -> None:
    """Widths are cut from the model that other axes leave, so what must still be saved ends just below the budget."""
    space = make_space(**JOINT, groups=dict.fromkeys(GROUP_SIZES, 1))
    source = cost(ARCH).macs
    for axes in ({"skip": 1}, {"skip": 2}, {"keep_rate": 0.5}, {"conv": 2}, {"skip": 1, "keep_rate": 0.6, "conv3": 1}):
        spared = space.decode(joint(**axes, budget=0.9)).cost.macs / source
        for budget in (0.3, 0.35, 0.4, 0.5, 0.6, 0.7):
            met = space.decode(joint(**axes, budget=budget)).cost.macs / source
            if budget < spared:
                assert 0.97 * budget < met <= budget, (axes, budget)
            elif spared < 0.9 * 0.97:
                assert met == spared  # what is cut so is below the budget: nothing is left to do


def test_candidates_that_share_a_name_are_one() -> None:
    point = make_space().complete({"budget": 0.5, "skip": 1, "lr": 1e-3})
    known = set(candidate_names("key", "arch", point))
    assert known & set(candidate_names("another decision", "arch", {**point, "budget": 0.9}))
    assert known & set(candidate_names("key", "arch", {**point, "method": "magnitude"}))  # nothing was cut by either
    assert not known & set(candidate_names("another decision", "arch", {**point, "method": "magnitude"}))
    assert not known & set(candidate_names("another decision", "arch", {**point, "lr": 2e-3}))


def test_blocks_go_in_the_order_of_their_importance() -> None:
    space = make_space()
    kept = [b.src for b in space.decode({"budget": 0.9, "skip": 2, "lr": 1e-3}).arch.stages[0].blocks]
    assert kept == [0, 3]  # importance 9, 1, 2, 5


JOINT = {"conv": (0, 2), "conv3": (0, 1), "keep_rate": (0.4, 1.0), "merge_start": (0, 3), "mlp_weight": (0.5, 2.0)}


def joint(**point: float) -> dict[str, float]:
    fixed = {"conv": 0, "conv3": 0, "keep_rate": 1.0, "merge_start": 0, "mlp_weight": 1.0}
    return {"budget": 0.5, "skip": 0, "lr": 1e-3, **fixed, **point}


def test_all_axes_at_once_and_the_budget_absorbs_them() -> None:
    space = make_space(**JOINT, groups=dict.fromkeys(GROUP_SIZES, 1))
    source = cost(ARCH).macs
    found = space.decode(joint(skip=1, conv=2, conv3=1, keep_rate=0.6, merge_start=3))
    assert [b.src for b in found.arch.blocks] == [0, 2, 3]  # block 1 is the least important one
    assert [b.mixer for b in found.arch.blocks] == ["conv1x1", "conv3x3", "attn"]
    assert [b.tokens is not None for b in found.arch.blocks] == [False, False, True]
    assert found.arch.blocks[2].tokens == 1 + int(16 * 0.6)
    # within a group of the budget, whatever else there is
    for point in (joint(), joint(skip=2), joint(conv=2), joint(keep_rate=0.7), joint(mlp_weight=2.0)):
        assert 0.4 * source < space.decode(point).cost.macs <= 0.5 * source
    spared = [sum(b.mlp for b in space.decode(joint(mlp_weight=w)).arch.blocks) for w in (0.5, 1.0, 2.0)]
    assert spared[0] < spared[1] < spared[2]


def test_points_that_mean_the_same_are_one_candidate() -> None:
    space = make_space(**JOINT)
    same = [joint(conv=0, conv3=0), joint(conv=0, conv3=1), joint(merge_start=2), joint(budget=0.5000001)]
    assert len({space.decode(point).key for point in same}) == 1
    other = [joint(lr=2e-3), joint(conv=1), joint(keep_rate=0.5), joint(budget=0.6)]
    assert len({space.decode(point).key for point in [*same, *other]}) == 5


def test_the_full_encoding_decides_for_every_block() -> None:
    space = make_space(encoding="full", skip=(0, 0), keep_rate=(0.5, 1.0))
    assert {v.name for v in space.variables if not v.fixed} == {
        "budget",
        "lr",
        "keep_rate",
        *(f"skip.{i}" for i in range(4)),
        *(f"mixer.{i}" for i in range(4)),
    }
    blocks = {f"skip.{i}": int(i == 2) for i in range(4)} | {f"mixer.{i}": "attn" for i in range(4)}
    point = {"budget": 0.5, "lr": 1e-3, "keep_rate": 0.5, **blocks, "mixer.1": "conv3x3", "mixer.2": "conv1x1"}
    found = space.decode({**point, "mixer.3": "none"}).arch.blocks
    assert [(b.src, b.mixer, b.tokens is None) for b in found] == [
        (0, "attn", False),
        (1, "conv3x3", True),
        (3, "none", True),
    ]
    with pytest.raises(UserError, match="all blocks are dropped"):
        space.decode({**point, **{f"skip.{i}": 1 for i in range(4)}})


def test_windows_exclude_before_anything_is_built() -> None:
    whole = cost(ARCH).params
    space = make_space(params=(0.0, 0.5 * whole))
    assert space.decode({"budget": 0.35, "skip": 2, "lr": 1e-3}).cost.params <= 0.5 * whole
    with pytest.raises(UserError, match="params = .* outside the window"):
        space.decode({"budget": 0.9, "skip": 0, "lr": 1e-3})
    assert 0 < space.summarise(100, seed=0).feasible < 1


def test_named_points_are_checked() -> None:
    space = make_space()
    for point, message in (
        ({"budget": 0.5, "skip": 1, "lr": 1e-3, "conv": 1}, r"conv = 1: must lie in \[0, 0\]"),
        ({"budget": 0.5, "skip": 1.5, "lr": 1e-3}, "skip = 1.5: must be a whole number"),
        ({"budget": 0.5, "skip": 1}, "the point lacks lr"),
        ({"bugdet": 0.5}, "bugdet: no variable of this space"),
        ({"method": "taylor"}, "method = 'taylor': must be one of nvit"),
    ):
        with pytest.raises(UserError, match=message):
            space.decode(point)


def test_summary_is_reproducible_and_within_the_window() -> None:
    space = make_space()
    summary = space.summarise(100, seed=3)
    assert summary == space.summarise(100, seed=3)
    assert summary != space.summarise(100, seed=4)
    assert summary.feasible == 1
    assert summary.macs.low <= summary.macs.median <= summary.macs.high <= 0.9 * cost(ARCH).macs
    assert len(summary.points) == 100
    low, high = space.reachable
    assert low <= 0.3
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
    with pytest.raises(UserError, match=r"space.conv = \[0, 5\]: the source has 4 blocks, so it must not exceed 4"):
        make_space(conv=(0, 5))


def test_deit_base_is_solved_in_well_under_a_second() -> None:
    """Not a timing test: the path of the largest usual source is complete and every budget hits."""
    arch = Arch.from_timm("deit_base_patch16_224")
    ones = Scores({name: torch.rand(size, dtype=torch.float64) for name, size in vector_sizes(arch, KINDS).items()})
    found = Space(SpaceTable(), arch, {"nvit": ones}).decode({"budget": 0.39})
    assert 0.37 < found.cost.macs / cost(arch).macs <= 0.39


def test_blocks_of_a_pyramid_are_dropped_and_every_stage_keeps_one() -> None:
    """From scores that are measured, as a search of a PVTv2 has them."""
    archs = (random_arch(Random(seed), "pvt_v2", ragged=False) for seed in range(999))
    arch = next(a for a in archs if a.depth >= len(a.stages) + 2 and all(b.qk == b.v for b in a.blocks))
    most = arch.depth - len(arch.stages)
    model = random_model(arch, 0, torch.float32)
    batches = [(random_images(arch, 0, batch=4, dtype=torch.float32), torch.zeros(4, dtype=torch.long))]
    scores = {"magnitude": get_method("magnitude", WidthMethod).score(model), "depth_kl": score_depth(model, batches)}
    table = SpaceTable(budget=(0.05, 1.0), skip=(0, most), groups=dict.fromkeys(GROUP_SIZES, 1))
    Space.check(table, arch, "magnitude")
    space = Space(table, arch, scores)
    assert space.summarise(32, 0).feasible > 0.5
    for skip in range(most + 1):
        found = space.decode({"budget": 1.0, "skip": skip}).arch
        assert found.depth == arch.depth - skip
        assert {b.src for b in found.blocks} == set(range(arch.depth)) - set(drop_order(scores["depth_kl"])[:skip])
    with pytest.raises(UserError, match=f"the source has {arch.depth} blocks, so it must not exceed {most}"):
        Space.check(table.model_copy(update={"skip": (0, most + 1)}), arch, "magnitude")


@pytest.mark.parametrize("family", [name for name, own in FAMILIES.items() if not own.supports("mixers", "tokens")])
def test_a_space_asks_for_nothing_that_the_source_s_family_cannot_have(family: str) -> None:
    arch = arch_of(contract_pruner.source(family, 7, attn_norm=False, mlp_norm=False))
    for capability, table in (("mixers", {"conv": (0, 1)}), ("tokens", {"keep_rate": (0.5, 1.0)})):
        if not FAMILIES[family].supports(capability):
            with pytest.raises(UserError, match=rf"space\.\w+ = .*which lacks '{capability}'.*set it to \["):
                Space.blank(SpaceTable(budget=(0.5, 0.9), **table), arch, "magnitude")
    space = Space.blank(SpaceTable(budget=(0.5, 0.9), encoding="full"), arch, "magnitude")
    convolutions = {"conv1x1", "conv3x3"} & {mixer for v in space.variables for mixer in v.choices}
    assert bool(convolutions) == FAMILIES[family].supports("mixers")
