"""Weights of kinds, and their slope over depth, move widths between spaces and blocks at equal cost."""

from __future__ import annotations

import pytest

from prunesweep.models import Arch, UserError
from prunesweep.models.published.archs import swin
from prunesweep.pruners import GROUP_SIZES
from prunesweep.search.config import SpaceTable
from prunesweep.search.space.space import Space
from tests.search.helpers import make_space

NEUTRAL = {"embed_weight": 1.0, "qk_weight": 1.0, "mlp_weight": 1.0, "depth_slope": 0.0}
RANGES = {
    "embed_weight": (0.1, 10.0),
    "qk_weight": (0.1, 10.0),
    "mlp_weight": (0.1, 10.0),
    "depth_slope": (-4.0, 4.0),
}
BUDGET = 0.45


def decoded(**point: float) -> Arch:
    space = make_space(**RANGES, groups=dict.fromkeys(GROUP_SIZES, 1))
    found = space.decode({"budget": BUDGET, "skip": 0, "lr": 1e-3, **NEUTRAL, **point})
    assert 0.98 * BUDGET < found.cost.macs / space.source_cost.macs <= BUDGET
    return found.arch


def test_neutral_weights_are_no_weights() -> None:
    plain = make_space(groups=dict.fromkeys(GROUP_SIZES, 1))
    assert decoded() == plain.decode({"budget": BUDGET, "skip": 0, "lr": 1e-3}).arch
    assert not set(NEUTRAL) & set(plain.distributions)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("embed_weight", lambda arch: arch.stages[0].width),
        ("qk_weight", lambda arch: sum(block.qk for block in arch.blocks)),
        ("mlp_weight", lambda arch: sum(block.mlp for block in arch.blocks)),
        ("depth_slope", lambda arch: sum(block.mlp for block in arch.blocks[2:])),
    ],
)
def test_a_weight_spares_its_units_and_the_budget_stays(name: str, units: object) -> None:
    assert callable(units)
    less, same, more = (units(decoded(**{name: value})) for value in (RANGES[name][0], NEUTRAL[name], RANGES[name][1]))
    assert less <= same <= more
    assert less < more


def test_a_slope_spares_late_stages() -> None:
    table = SpaceTable.model_validate({"budget": (0.1, 0.9), "depth_slope": (-3.0, 3.0)})
    space = Space.blank(table, swin("tiny"), "taylor")
    early, late = (
        [stage.width for stage in space.decode({"budget": 0.4, "depth_slope": slope}).arch.stages]
        for slope in (-3.0, 3.0)
    )
    assert early[0] > late[0]
    assert early[3] < late[3]


def test_a_slope_belongs_to_the_compact_encoding() -> None:
    with pytest.raises(ValueError, match="depth_slope: belongs to encoding 'compact'"):
        SpaceTable.model_validate({"encoding": "full", "depth_slope": (-1.0, 1.0)})


def test_a_weight_is_above_0() -> None:
    with pytest.raises(ValueError, match="embed_weight = .*: must be above 0"):
        SpaceTable.model_validate({"embed_weight": (0.0, 1.0)})
    with pytest.raises(UserError, match="qk_weight"):
        make_space(**RANGES).decode({"budget": 0.5, "skip": 0, "lr": 1e-3, **NEUTRAL, "qk_weight": 11.0})
