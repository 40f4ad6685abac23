"""Candidates of a search cost what their budgets say."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch

from prunesweep.models import Arch, UserError
from prunesweep.pruners import GROUP_SIZES
from prunesweep.search.config import load_config
from prunesweep.search.space.space import Params, Space
from prunesweep.search.space.warm_start import axis_points, met_points
from prunesweep.search.store.study import PROPOSALS, Study
from tests.search.helpers import make_space
from tests.search.store.test_study import load

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits.toml"
NEUTRAL = {"skip": 0, "conv": 0, "keep_rate": 1.0, "budget": 0.9}


@cache
def digits(encoding: str = "compact", **table: Any) -> Space:
    """The space of the digits' example and a learning rate, without its scores."""
    config = load_config(EXAMPLE)
    with torch.device("meta"):
        model = timm.create_model(config.source.model, img_size=8, in_chans=1, num_classes=10, **config.source.args)
    blocks = {"encoding": "full", "skip": (0, 0), "conv": (0, 0), "conv3": (0, 0)} if encoding == "full" else {}
    changed = config.space.model_copy(update={"lr": (5e-4, 3e-3), **blocks, **table})
    return Space.blank(changed, Arch.from_timm(model), "nvit")


def drawn(space: Space, count: int, seed: int = 0) -> list[Params]:
    random = Random(seed)
    return [{v.name: v.draw(random) for v in space.variables if not v.fixed} for _ in range(count)]


def share(space: Space, point: Params) -> float:
    """MACs of a point's candidate over those of the source."""
    return space.decode(point).cost.macs / space.source_cost.macs


def meets(space: Space, point: Params) -> bool:
    budget = float(point["budget"])
    try:
        return 0.995 * budget <= share(space, point) <= budget
    except UserError:
        return False


@pytest.mark.parametrize("encoding", ["compact", "full"])
def test_every_point_that_is_placed_meets_its_budget(encoding: str) -> None:
    space = digits(encoding)
    points = drawn(space, 60)
    assert sum(meets(space, point) for point in points) < 50  # as they were drawn
    for point in points:
        placed = space.placed(point)
        assert meets(space, placed), (point, placed)
        assert space.placed(placed) == placed
        assert placed["budget"] == point["budget"]
        for name, value in placed.items():
            if name in ("skip", "conv"):
                assert value <= point[name]
            elif name == "keep_rate":
                assert value >= point[name]
            elif name.startswith(("skip.", "mixer.")):
                assert value in (point[name], 0, "attn")
            else:
                assert value == point[name]
        if meets(space, point):
            assert placed == point


def test_two_budgets_that_leave_no_width_to_give_back_are_two_candidates() -> None:
    space = digits()
    points = [{**drawn(space, 1)[0], **NEUTRAL, "skip": 2, "budget": budget} for budget in (0.8, 0.9)]
    assert len({space.decode(point).arch for point in points}) == 1
    placed = [space.placed(point) for point in points]
    assert [point["skip"] for point in placed] == [1, 0]
    assert len({space.decode(point).arch for point in placed}) == 2


def test_a_budget_becomes_what_the_candidate_costs() -> None:
    space = digits()
    point = {**drawn(space, 1)[0], **NEUTRAL, "skip": 2}
    priced = space.priced(point)
    assert {**priced, "budget": 0.9} == point
    assert priced["budget"] == pytest.approx(share(space, point)) == pytest.approx(2 / 3, abs=0.01)
    assert space.decode(priced).arch == space.decode(point).arch
    assert space.priced(priced) == priced


def test_budgets_between_coarse_units_become_those_of_a_neighbour() -> None:
    coarse = {**dict.fromkeys(GROUP_SIZES, 0), "heads": 1}
    space = make_space(groups=coarse, skip=(0, 0), budget=(0.9, 1.0))
    found = set()
    for point in drawn(space, 30):
        placed = space.placed(point)
        assert meets(space, placed)
        found.add(placed["budget"] == point["budget"])
    assert found == {True, False}
    (one,) = {share(space, space.placed(point)) for point in drawn(space, 30)}
    narrow = make_space(groups=coarse, skip=(0, 0), budget=(one + 0.01, 0.99))  # nothing costs that
    with pytest.raises(UserError, match=r"the smallest step left, .*outside space.budget = "):
        narrow.priced(drawn(narrow, 1)[0])


def test_where_axes_cannot_give_back_the_budget_does() -> None:
    space = digits(skip=(1, 3))
    point = {**drawn(space, 1)[0], **NEUTRAL, "skip": 3}
    placed = space.placed(point)
    assert placed["skip"] == 3
    assert placed["budget"] < 0.6
    assert meets(space, placed)


def test_axes_give_back_all_where_what_they_leave_is_outside_of_the_window() -> None:
    space = digits(budget=(0.6, 0.9), skip=(1, 3))
    placed = space.placed({**drawn(space, 1)[0], **NEUTRAL, "skip": 3})
    assert placed["skip"] == 1
    assert 0.8 < placed["budget"] < 0.85
    assert meets(space, placed)


def test_where_the_budget_is_fixed_at_the_whole_source_other_axes_keep_what_they_save() -> None:
    space = digits(budget=(1.0, 1.0))
    point = {**drawn(space, 1)[0], **NEUTRAL, "skip": 3}
    del point["budget"]
    assert space.placed(point) == point
    assert share(space, point) < 0.6


def test_a_window_above_all_models_is_refused_before_a_search() -> None:
    space = digits()
    table = space.table.model_copy(update={"budget": (0.7, 0.9), "skip": (2, 3)})
    with pytest.raises(UserError, match=r"with all its widths the largest model has only 0.66\d of the source's MACs"):
        Space.check(table, space.arch, "nvit")
    Space.check(table.model_copy(update={"budget": (0.6, 0.9)}), space.arch, "nvit")


def test_points_to_start_from_keep_their_blocks_where_the_window_allows_it() -> None:
    space = digits()
    points = axis_points(space, 16)
    met = met_points(space, points)
    assert all(meets(space, point) for point in met)
    assert [{**point, "budget": 0} for point in met] == [{**point, "budget": 0} for point in points]
    assert sum(point["budget"] != before["budget"] for point, before in zip(met, points, strict=True)) > 6
    narrow = digits(budget=(0.6, 0.9))
    assert all(meets(narrow, point) for point in met_points(narrow, axis_points(narrow, 16)))


@pytest.mark.parametrize("sampler", ["budget_gp", "tpe", "nsga2", "gp", "qmc", "random"])
def test_every_sampler_proposes_and_learns_from_placed_points(tmp_path: Path, sampler: str) -> None:
    space = digits()
    study = Study(
        tmp_path / "j", space.distributions, 0, sampler=sampler, trials=24, fit=space.fitted, place=space.placed
    )
    for _ in range(12 if sampler == "gp" else 24):
        number, point = study.ask()
        assert meets(space, point)
        study.tell(number, [90 * share(space, point) - float(point["skip"]), share(space, point)])
    asked = load(tmp_path / "j", PROPOSALS).trials
    assert all(space.placed(trial.params) == trial.params for trial in asked)
    assert len({tuple(trial.params.values()) for trial in asked}) == len(asked)
    assert {trial.params["skip"] for trial in asked} > {0, 1}
