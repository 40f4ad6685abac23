from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch

from prunesweep.models import Arch, Block, Stage, UserError, cost, cut_arch
from prunesweep.models.latency.table import Grid, LatencyTable
from prunesweep.models.latency.timing import Setting
from prunesweep.pruners import MACS, PARAMS, kind_of, vector_sizes
from prunesweep.pruners.nvit.schedule import (
    KINDS,
    Grouping,
    PruneGroup,
    adjust,
    cut_of,
    dims_of,
    live_step,
    narrow,
    reference_index,
    reference_step,
    total_cost,
    unit_gains,
)
from tests.generate import random_arch

ONES = {"embed": 1, "heads": 1, "qk": 1, "v": 1, "mlp": 1}
NONE = dict.fromkeys(ONES, 0)


def vit(depth: int = 2, width: int = 12, heads: int = 3, head: int = 4, mlp: int = 10) -> Arch:
    blocks = tuple(Block(src=i, heads=heads, qk=head, v=head, scale=0.5, mlp=mlp) for i in range(depth))
    return Arch(
        family="vit",
        source="test",
        img_size=(4, 4),
        patch_size=(2, 2),
        in_chans=1,
        num_classes=3,
        stages=(Stage(width=width, grid=(2, 2), blocks=blocks),),
    )


def whole(arch: Arch) -> dict[str, torch.Tensor]:
    return {name: torch.ones(size, dtype=torch.bool) for name, size in vector_sizes(arch, KINDS).items()}


def random_masks(random: Random, arch: Arch) -> dict[str, torch.Tensor]:
    keep = whole(arch)
    for mask in keep.values():
        mask[random.sample(range(len(mask)), random.randrange(len(mask)))] = False
    return keep


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("seed", range(8))
def test_dimensions_masks_and_cuts_are_one_decision(family: str, seed: int) -> None:
    random = Random(seed)
    arch = random_arch(random, family, ragged=False)
    keep = random_masks(random, arch)
    assert narrow(arch, dims_of(keep)) == cut_arch(arch, cut_of(arch, keep))
    assert narrow(arch, dims_of(whole(arch))) == arch


@pytest.mark.parametrize("measure", [MACS, PARAMS], ids=lambda m: m.name)
def test_gains_are_what_one_unit_less_saves(measure) -> None:
    arch = vit()
    full = vector_sizes(arch, KINDS)
    gains = unit_gains(measure, arch, full, Grouping(ONES))
    assert set(gains) == set(full)
    for name in full:
        fewer = narrow(arch, {name: full[name] - 1})
        assert gains[name] == getattr(cost(arch), measure.name) - getattr(cost(fewer), measure.name) > 0


def test_no_gain_at_the_minimum_but_in_the_residual_stream() -> None:
    arch = vit(width=8, heads=2, head=4, mlp=8)
    sizes = {"embed": 8, "heads": 2, "qk": 4, "v": 2, "mlp": 4}
    full = vector_sizes(arch, KINDS)
    gains = unit_gains(MACS, arch, full, Grouping(sizes, {"mlp": 1.0}))
    assert {kind_of(name) for name, gain in gains.items() if gain > 0} == {"embed", "v"}


def test_latency_that_falls_with_width_is_no_gain() -> None:
    arch = vit(depth=1, width=8, heads=2, head=4, mlp=8)
    axes = {"embed": (4, 8), "heads": (1, 2), "qk": (2, 4), "v": (2, 4), "mlp": (0, 8)}
    values = sum(np.meshgrid([1, 5], [0, 2], [3, 1], [0, 0], [0, 4], indexing="ij"))  # wider query/key is faster
    grid = Grid(axes, np.asarray(values, dtype=float))
    overhead = Grid({"stages.0": (4, 8)}, np.array([1.0, 2.0]))
    table = LatencyTable(
        setting=Setting(batch=1), device_name="x", torch="x", source=arch, overhead=overhead, stages=({"attn": grid},)
    )
    assert total_cost(table, arch) == 5 + 2 + 1 + 0 + 4 + 2
    gains = unit_gains(table, arch, vector_sizes(arch, KINDS), Grouping(ONES))
    assert gains == pytest.approx(
        {"stages.0.embed": 1.25, "blocks.0.heads": 2, "blocks.0.qk": 0, "blocks.0.v": 0, "blocks.0.mlp": 0.5}
    )


def test_scores_weigh_saliency_against_cost() -> None:
    keep = {"blocks.0.mlp": torch.tensor([True, False, True])}
    adjusted = adjust({"blocks.0.mlp": torch.tensor([5.0, 7.0, 1.0])}, keep, {"blocks.0.mlp": 3.0}, 0.5)
    assert adjusted["blocks.0.mlp"].tolist() == [3.5, -1.5, -0.5]
    assert adjusted["blocks.0.mlp"].dtype == torch.float64


SMALL = {"blocks.0.qk": torch.tensor([4.0, 1, 3, 2]), "blocks.0.mlp": torch.tensor([5.0, 1, 9, 2, 2, 8])}


def all_of(vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones(len(vector), dtype=torch.bool) for name, vector in vectors.items()}


def test_the_lowest_groups_of_all_vectors_go() -> None:
    grouping = Grouping(ONES | {"qk": 2, "mlp": 2})
    step = live_step(SMALL, all_of(SMALL), grouping, 2)
    # qk {1, 3} and mlp {1, 3} tie at 3: the vector that comes first goes first
    assert step.removed == (PruneGroup("blocks.0.qk", (1, 3), 3.0), PruneGroup("blocks.0.mlp", (1, 3), 3.0))
    assert step.threshold == 3.0
    step = live_step(SMALL, all_of(SMALL), grouping, 9)
    assert [group.units for group in step.removed] == [(1, 3), (1, 3), (0, 4)]  # a last group stays


def test_groups_form_anew_from_what_is_left() -> None:
    keep = all_of(SMALL)
    keep["blocks.0.mlp"][1] = False
    step = live_step(SMALL, keep, Grouping(NONE | {"mlp": 2}), 9)
    assert step.removed == (PruneGroup("blocks.0.mlp", (3, 4), 4.0), PruneGroup("blocks.0.mlp", (0, 5), 13.0))


def test_kinds_and_floors() -> None:
    floors = {"mlp": 0.6}  # 4 of 6
    step = live_step(SMALL, all_of(SMALL), Grouping(NONE | {"mlp": 2}, floors), 9)
    assert [(group.vector, group.units) for group in step.removed] == [("blocks.0.mlp", (1, 3))]
    assert live_step(SMALL, all_of(SMALL), Grouping(NONE | {"v": 1}), 9).removed == ()
    assert live_step(SMALL, all_of(SMALL), Grouping(NONE | {"v": 1}), 9).threshold == -math.inf


@pytest.mark.parametrize("seed", range(10))
def test_steps_end_at_the_narrowest_model(seed: int) -> None:
    """Whatever the scores; group sizes that do not divide a vector leave a smaller last group."""
    random = Random(seed)
    arch = random_arch(random, random.choice(["vit", "swin"]), ragged=False)
    grouping = Grouping({kind: random.choice([0, 1, 2, 3, 5]) for kind in KINDS} | {"embed": 2}, {"embed": 0.3})
    keep, generator = whole(arch), torch.Generator().manual_seed(seed)
    removed = []
    while True:
        scores = {name: torch.rand(len(mask), generator=generator) for name, mask in keep.items()}
        gains = unit_gains(MACS, narrow(arch, dims_of(keep)), dims_of(whole(arch)), grouping)
        step = live_step(adjust(scores, keep, gains, 1e-3), keep, grouping, 3)
        for group in step.removed:
            assert keep[group.vector][list(group.units)].all()
            keep[group.vector][list(group.units)] = False
        removed.append(len(step.removed))
        if not step.removed:
            break
    assert removed[:-2] == [3] * (len(removed) - 2)
    assert dims_of(keep) == grouping.narrowest(dims_of(whole(arch)))
    assert min(dims_of(keep).values()) >= 1
    narrow(arch, dims_of(keep)).validate()


def test_the_reference_counts_what_is_gone_again() -> None:
    """As the published code: two groups per step, of those that are there and those that were."""
    assert [reference_index(k, 2, 5) for k in range(5)] == [0, 1, 3, 4, 4]
    vectors = {"blocks.0.mlp": torch.tensor([1.0, 2, 3, 4, 5, 6])}
    grouping, keep = Grouping(NONE | {"mlp": 1}), all_of(vectors)
    taken = []
    for k in range(6):
        adjusted = adjust(vectors, keep, {"blocks.0.mlp": 0.0}, 0.0)
        step = reference_step(adjusted, keep, grouping, 2, k)
        for group in step.removed:
            keep[group.vector][list(group.units)] = False
        taken.append([unit for group in step.removed for unit in group.units])
    assert taken == [[0], [1], [2, 3], [4], [], []]  # the best one stays for ever


def test_reference_ranks_the_dead_by_their_cost() -> None:
    """Where a pruned unit still counts little, it sorts behind a cheap live one and takes up no share."""
    vectors = {"blocks.0.qk": torch.tensor([1.0, 1, 9]), "blocks.0.mlp": torch.tensor([0.5, 3, 9])}
    keep = {"blocks.0.qk": torch.tensor([True] * 3), "blocks.0.mlp": torch.tensor([False, True, True])}
    gains = {"blocks.0.qk": 3.0, "blocks.0.mlp": 1.0}
    adjusted = adjust(vectors, keep, gains, 1.0)  # qk -2 -2 6, mlp -1 2 8
    step = reference_step(adjusted, keep, Grouping(NONE | {"qk": 1, "mlp": 1}), 2, 1)
    assert step.threshold == -2
    assert [(group.vector, group.units) for group in step.removed] == [("blocks.0.qk", (0,)), ("blocks.0.qk", (1,))]


@pytest.mark.parametrize(
    ("sizes", "floors", "message"),
    [
        ({"embed": 1}, {}, "groups = .*give a whole number of at least 0 for each of embed, heads, qk, v, mlp"),
        (ONES | {"qk": -1}, {}, "groups = "),
        (ONES | {"qk": 2.0}, {}, "groups = "),
        (NONE, {}, "not 0 for all"),
        (ONES, {"neck": 0.5}, "floors = .*give shares in 0..1 for some of embed"),
        (ONES, {"qk": 1.5}, "floors = "),
    ],
)
def test_impossible_groupings_are_refused(sizes, floors, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grouping(sizes, floors)
