"""Halves of blocks: counted, least important first, in the compact encoding, and a bit and a mixer for each in full."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from prunesweep.models import Arch, UserError
from prunesweep.models.published.archs import swin
from prunesweep.pruners import GROUP_SIZES
from prunesweep.search.config import SpaceTable
from prunesweep.search.space.space import Params, Space
from prunesweep.search.space.warm_start import prior_points
from tests.search.helpers import make_space

GROUPS = dict.fromkeys(GROUP_SIZES, 1)
FULL = {"encoding": "full", "skip": (0, 0), "groups": GROUPS, "lr": (1e-3, 1e-3)}


def counted(arch: Arch) -> int:
    """Halves that are left."""
    return sum((block.mixer != "none") + (block.mlp > 0) for block in arch.blocks)


def test_halves_go_by_their_saliency_and_the_budget_stays() -> None:
    space = make_space(halves=(0, 7), groups=GROUPS)
    vectors = space.scores["nvit"].vectors
    sums = {}
    for i in range(4):
        sums[i, "attn"] = sum(float(vectors[f"blocks.{i}.{kind}"].sum()) for kind in ("heads", "qk", "v"))
        sums[i, "mlp"] = float(vectors[f"blocks.{i}.mlp"].sum())
    order = sorted(sums, key=lambda half: sums[half])
    for count in range(8):
        found = space.decode({"budget": 0.3, "skip": 0, "lr": 1e-3, "halves": count})
        left = {
            (b.src, kind) for b in found.arch.blocks for kind in ("attn", "mlp") if (b.mlp if kind == "mlp" else b.qk)
        }
        assert left == set(order[count:])
        assert found.cost.macs <= 0.3 * space.source_cost.macs
        if count < 4:
            assert found.cost.macs > 0.29 * space.source_cost.macs


def test_halves_come_after_dropped_blocks_and_convolutions() -> None:
    space = make_space(halves=(0, 3), conv=(0, 1), groups=GROUPS)
    arch = space.decode({"budget": 0.4, "skip": 2, "conv": 1, "lr": 1e-3, "halves": 2}).arch
    assert [b.src for b in arch.blocks] in ([0, 3], [3], [0])
    assert counted(arch) == 2


def test_every_stage_keeps_a_block() -> None:
    table = SpaceTable.model_validate({"halves": (0, 20), "budget": (0.01, 0.9)})
    arch = swin("tiny")
    space = Space.blank(table, arch, "taylor")
    found = space.decode({"budget": 0.05, "halves": 20}).arch
    assert all(stage.blocks for stage in found.stages)
    assert counted(found) == 4
    with pytest.raises(UserError, match="space.halves = .* the source has 12 blocks, so it must not exceed 20"):
        Space.blank(SpaceTable.model_validate({"halves": (0, 21)}), arch, "taylor")


def point(space: Space, **given: float | str) -> Params:
    return {**space.neutral, **{name.replace("_at_", "."): value for name, value in given.items()}}


def test_bits_drop_mlps_and_a_block_without_halves_is_gone() -> None:
    space = make_space(**FULL, mlp_skip=(0, 1))
    found = space.decode(
        point(space, budget=0.4, mlp_skip_at_1=1, mlp_skip_at_2=1, mixer_at_2="none", mixer_at_3="none")
    )
    assert [(b.src, b.mixer, b.mlp > 0) for b in found.arch.blocks] == [
        (0, "attn", True),
        (1, "attn", False),
        (3, "none", True),
    ]
    assert 0.39 * space.source_cost.macs < found.cost.macs <= 0.4 * space.source_cost.macs


@pytest.mark.parametrize(
    ("axis", "name", "units"),
    [
        ("mlp_weights", "mlp_weights.2", lambda arch: arch.blocks[2].mlp / sum(b.mlp for b in arch.blocks)),
        (
            "attention_weights",
            "attention_weights.1",
            lambda arch: arch.blocks[1].total_v + arch.blocks[1].heads * arch.blocks[1].qk,
        ),
        ("embed_weights", "embed_weights.0", lambda arch: arch.stages[0].width),
    ],
)
def test_a_weight_of_a_place_spares_its_units(axis: str, name: str, units: object) -> None:
    assert callable(units)
    space = make_space(**FULL, **{axis: (0.05, 20.0)})
    less, more = (units(space.decode({**space.neutral, "budget": 0.4, name: value}).arch) for value in (0.05, 20.0))
    assert less < more
    plain = make_space(**FULL)
    assert space.decode({**space.neutral, "budget": 0.4}).arch == plain.decode({**plain.neutral, "budget": 0.4}).arch
    assert not [v for v in plain.variables if v.name.startswith(axis)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"mlp_skip": (0, 1)}, "mlp_skip: belongs to encoding 'full'; 'compact' has halves"),
        ({"mlp_weights": (0.5, 2.0)}, "mlp_weights: belongs to encoding 'full'"),
        ({"encoding": "full", "halves": (0, 1)}, "halves: belongs to encoding 'compact'"),
        ({"encoding": "full", "mlp_skip": (1, 1)}, r"mlp_skip = \[1, 1\]: must be \[0, 0\] or \[0, 1\]"),
    ],
)
def test_encodings_do_not_mix(table: Mapping[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpaceTable.model_validate(table)


def test_points_of_the_prior_can_be_built() -> None:
    space = make_space(**FULL, mlp_skip=(0, 1), budget=(0.1, 0.9))
    dropped = 0
    for drawn in prior_points(space, 20, 0):
        dropped += sum(not block.mlp for block in space.decode(space.placed(drawn)).arch.blocks)
    assert dropped
