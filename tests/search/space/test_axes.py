"""A search variable is one object: its key in [space], its variable, its scores and its effect all follow from it."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError
from prunesweep.pruners import GROUP_SIZES
from prunesweep.search.config import SearchConfig, SearchTable, SpaceTable, parse_config
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.space.axes import (
    AXES,
    POSITIVE,
    Axis,
    Draft,
    ScoredSource,
    active_axes,
    register,
    unregister,
)
from prunesweep.search.space.space import Params
from prunesweep.search.space.warm_start import axis_points
from prunesweep.search.store.study import Study
from prunesweep.training import Recipe
from tests.conftest import TINY
from tests.search.helpers import make_run, make_space


@dataclass(frozen=True, kw_only=True)
class HeadWeight(Axis):
    """A factor on the saliency of heads."""

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        return dataclasses.replace(draft, weights=(*draft.weights, ("heads", float(point[self.name]))))


@dataclass(frozen=True, kw_only=True)
class WeightDecay(Axis):
    """The weight decay of finetuning."""

    def recipe(self, recipe: Recipe, value: Any) -> Recipe:
        return recipe.model_copy(update={"weight_decay": value})


HEADS = HeadWeight(
    name="head_weight",
    meaning="factor on the saliency of heads",
    default=(1.0, 1.0),
    log=True,
    limits=POSITIVE,
    neutral=1.0,
    alone=True,
)
DECAY = WeightDecay(name="decay", meaning="weight decay of finetuning", default=(0.05, 0.05), trains=True)


@pytest.fixture
def toys() -> Iterator[None]:
    before = dict(SpaceTable.model_fields)
    for axis in (HEADS, DECAY):
        register(axis)
    try:
        yield
    finally:
        for axis in (HEADS, DECAY):
            unregister(axis.name)
    assert list(SpaceTable.model_fields) == list(before)


def config(**space: Any) -> SearchConfig:
    return parse_config({**TINY, "space": {**TINY["space"], **space}}, "toy.toml")


@pytest.mark.usefixtures("toys")
def test_a_new_axis_is_a_key_of_the_space_with_its_default_and_its_limits() -> None:
    assert SpaceTable().head_weight == (1.0, 1.0)
    assert SearchConfig.model_validate({k: v for k, v in TINY.items() if k != "space"}).space.head_weight == (1.0, 1.0)
    table = config(head_weight=[0.5, 2.0]).space
    assert table.head_weight == (0.5, 2.0)
    text = config(head_weight=[0.5, 2.0]).to_toml()
    assert parse_config(tomllib.loads(text), "again").space == table
    for value, message in (
        ([0.0, 1.0], "space: head_weight = [0.0, 1.0]: must be above 0"),
        ([2.0, 1.0], "space: head_weight = [2.0, 1.0]: low must not exceed high"),
        (["a", 1.0], "space.head_weight.0 = 'a': input should be a valid number"),
    ):
        with pytest.raises(UserError) as error:
            config(head_weight=value)
        assert message in str(error.value)
    with pytest.raises(UserError, match="did you mean 'head_weight'"):
        config(head_wieght=[0.5, 2.0])


def test_an_axis_that_is_gone_is_an_unknown_key(toys: None) -> None:
    unregister("decay")
    with pytest.raises(UserError, match=r"space.decay: unknown key; known here: encoding, budget, budget_scale,"):
        config(decay=[0.0, 0.1])
    register(DECAY)


@pytest.mark.usefixtures("toys")
def test_names_and_keys_are_taken_once() -> None:
    for name in ("budget", "skip_order", "method", "head_weight", "groups"):
        with pytest.raises(ValueError, match=f"axis '{name}': {name} is taken"):
            register(Axis(name=name, meaning="again"))
    assert AXES["head_weight"] is HEADS


@pytest.mark.usefixtures("toys")
def test_a_search_over_new_axes_proposes_and_decodes_them(tmp_path: Path) -> None:
    """Without processes: the study proposes, the coordinator hands out, the axes decide."""
    space = make_space(head_weight=(0.1, 10.0), decay=(0.0, 0.1), groups=dict.fromkeys(GROUP_SIZES, 1))
    assert {"head_weight", "decay"} <= set(space.distributions)
    run = make_run(tmp_path / "r")
    study = Study(run / "study.journal", space.distributions, 0)
    coordinator = Coordinator(run, study, space, SearchTable(trials=6), max_concurrent=6, seed=0)
    tasks = [coordinator.next() for _ in range(6)]
    points = [task.point for task in tasks if task is not None]
    assert len({point["head_weight"] for point in points}) == 6
    assert all(0.0 <= point["decay"] <= 0.1 for point in points)

    point = {"budget": 0.4, "skip": 0, "lr": 1e-3, "decay": 0.0}
    heads = [sum(b.heads for b in space.decode({**point, "head_weight": w}).arch.blocks) for w in (0.1, 10.0)]
    assert heads[0] < heads[1]
    keys = {space.decode({**point, "head_weight": 1.0, "decay": decay}).key for decay in (0.0, 0.1)}
    assert len(keys) == 2  # the same architecture, trained differently
    alone = [p["head_weight"] for p in axis_points(space, 100) if p["head_weight"] != 1.0]
    assert sorted(alone) == pytest.approx([3.25, 5.5, 7.75, 10.0])


def test_axes_that_are_there_leave_the_source_as_it_is_at_their_neutral_values() -> None:
    space = make_space(
        budget=(0.3, 1.0), conv=(0, 2), conv3=(0, 1), keep_rate=(0.4, 1.0), merge_start=(0, 3), mlp_weight=(0.5, 2.0)
    )
    active = active_axes(space.table)
    neutral = {axis.name: axis.neutral for axis in active if axis.neutral is not None}
    point = {name: int(v) if AXES[name].whole else v for name, v in neutral.items()}
    assert space.decode({**point, "lr": 1e-3}).arch.hash == space.arch.hash
