"""What a search begins with: the user's points, another front, published forms, and a prior for every block."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunesweep.models import Arch, UserError
from prunesweep.models.published.archs import deit, searched, swin
from prunesweep.models.published.comparison import PUBLISHED, published_arch
from prunesweep.search.config import SearchConfig, SpaceTable
from prunesweep.search.space.space import Params, Space
from prunesweep.search.space.warm_start import (
    axis_points,
    nearest_point,
    neutral_points,
    prior_points,
    published_points,
    start_points,
)
from prunesweep.search.store.run import Result, Run
from tests.conftest import TINY
from tests.search.helpers import make_run

COMPACT = {"budget": (0.3, 1.0), "skip": (0, 4), "conv": (0, 6), "conv3": (0, 3), "keep_rate": (0.4, 1.0)}


def make_space(arch: Arch, **table: object) -> Space:
    return Space.blank(SpaceTable.model_validate(table), arch, "taylor")


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_a_published_form_is_met_where_the_space_has_it(size: str) -> None:
    """SPViT's DeiT in the compact space of its own source: the same mixers, and MACs close below its own."""
    arch, space = searched(f"deit_{size}"), make_space(deit(size), **COMPACT)
    found = space.decode(nearest_point(space, arch, deit(size)))
    assert [b.mixer for b in found.arch.blocks] == [b.mixer for b in arch.blocks]
    share = found.cost.macs / space.decode({**nearest_point(space, arch, deit(size)), "budget": 1.0}).cost.macs
    assert 0.3 < share < 1


def test_blocks_of_another_depth_are_matched_by_their_place() -> None:
    half = Arch.from_dict({**deit("tiny").to_dict(), "stages": [shortened(deit("tiny"))]})
    space = make_space(half, **{**COMPACT, "conv": (0, 3)})
    point = nearest_point(space, searched("deit_base"), deit("base"))  # 3 of 12 blocks 1x1, then 2 of 3x3
    assert (point["conv"], point["conv3"], point["skip"]) == (3, 1, 0)


def shortened(arch: Arch) -> dict[str, object]:
    (stage,) = arch.to_dict()["stages"]
    return {**stage, "blocks": stage["blocks"][:6]}


def test_every_block_has_its_own_bit_and_mixer() -> None:
    arch = searched("swin_tiny")
    space = make_space(swin("tiny"), encoding="full", budget=(0.3, 1.0))
    point = nearest_point(space, arch, swin("tiny"))
    assert [point[f"mixer.{b.src}"] for b in arch.blocks] == [b.mixer for b in arch.blocks]
    kept = nearest_point(
        make_space(deit("small"), encoding="full"), published_arch("uvc_deit_small_r50_skips"), deit("small")
    )
    assert [kept[f"skip.{i}"] for i in range(12)] == [int(bit == "0") for bit in "111111110101"]


def test_ranges_are_kept() -> None:
    space = make_space(
        deit("base"),
        budget=(0.3, 0.4),
        conv=(0, 2),
        conv3=(0, 1),
        keep_rate=(0.8, 1.0),
        lr=(1e-5, 1e-3),
        embed_weight=(0.5, 8.0),
    )
    points = published_points(space)
    assert {"spvit_deit_base", "uvc_deit_small_r50_skips"} <= set(points)
    for point in points.values():
        assert set(point) == set(space.distributions)
        assert point["embed_weight"] == 1.0  # neutral, which is not its middle
        assert space.complete(point)["lr"] == pytest.approx(1e-4)  # in the middle of a logarithmic scale


def test_only_forms_of_the_family_that_have_a_record_count() -> None:
    names = set(published_points(make_space(swin("small"), encoding="full")))
    assert names == {"spvit_swin_tiny", "spvit_swin_small", "spvit_swin_base"}
    assert all(PUBLISHED[name].arch is not None for name in names)


def test_the_prior_looks_like_what_searches_have_found() -> None:
    space = make_space(deit("small"), encoding="full", budget=(0.3, 0.9))
    points = prior_points(space, 40, 0)
    assert points == prior_points(space, 40, 0) != prior_points(space, 40, 1)
    prefixes = set()
    for point in points:
        mixers = [str(point[f"mixer.{i}"]) for i in range(12)]
        prefix = sum(m != "attn" for m in mixers)
        assert mixers == sorted(mixers, key=["conv1x1", "conv3x3", "attn"].index)
        assert sum(int(point[f"skip.{i}"]) for i in range(12)) <= 2
        prefixes.add(prefix)
        space.complete(point)
    assert prefixes == set(range(6))


def test_the_prior_of_windows_changes_the_first_stage() -> None:
    space = make_space(swin("tiny"), encoding="full")
    changed = [sum(p[f"mixer.{i}"] != "attn" for p in prior_points(space, 60, 0)) / 60 for i in range(12)]
    assert min(changed[:2]) > 0.5
    assert max(changed[2:]) < 0.4
    assert changed[11] == 0


def test_each_axis_alone_comes_first() -> None:
    space = make_space(deit("tiny"), **{**COMPACT, "budget": (0.2, 0.9), "merge_start": (0, 4), "lr": (1e-5, 1e-3)})
    points = axis_points(space, 100)
    width, blocks, convs, tokens = (
        [p for p in points if changed(p, space) == {name}] for name in ("budget", "skip", "conv", "keep_rate")
    )
    assert [len(width), len(blocks), len(convs), len(tokens)] == [4, 4, 4, 4]
    assert [p["budget"] for p in width] == pytest.approx([0.55, 0.2, 0.725, 0.375])
    assert [p["skip"] for p in blocks] == [2, 4, 1, 3]
    assert [(p["conv"], p["conv3"]) for p in convs] == [(3, 1), (6, 3), (2, 1), (4, 2)]
    assert [p["keep_rate"] for p in tokens] == pytest.approx([0.7, 0.4, 0.85, 0.55])
    dropped = space.decode(blocks[1]).arch  # what is left is as wide as the budget's upper end allows
    assert [b.heads for b in dropped.blocks] == [3] * 8
    assert axis_points(space, 6) == points[:6]


def changed(point: Params, space: Space) -> set[str]:
    neutral = {"budget": space.table.budget[1], "skip": 0, "conv": 0, "keep_rate": 1.0}
    return {name for name, value in neutral.items() if point[name] != value}


@pytest.mark.parametrize("encoding", [{"encoding": "full"}, {**COMPACT, "merge_start": (2, 4)}])
def test_neutral_points_cover_the_budgets_and_leave_all_else_as_it_is(encoding: dict[str, object]) -> None:
    ranges = {"budget": (0.1, 0.9), "embed_weight": (0.1, 2.0), "lr": (1e-5, 1e-3), "budget_scale": "log"}
    space = make_space(deit("tiny"), **{**encoding, **ranges})
    points = neutral_points(space, 5)
    assert [p["budget"] for p in points] == pytest.approx([0.1, 0.9, 0.3, 0.1 * 3**0.5, 0.3 * 3**0.5])
    widths = Space.blank(SpaceTable(budget=(0.1, 0.9)), space.arch, "taylor")
    for point in points:
        assert space.decode(point).arch == widths.decode({"budget": point["budget"]}).arch
    fixed = make_space(deit("tiny"), **COMPACT | {"budget": (0.5, 0.5)})
    assert neutral_points(fixed, 5) == []


def test_points_along_axes_take_what_neutral_points_leave_of_a_third_of_the_trials() -> None:
    space = make_space(deit("tiny"), budget=(0.3, 1.0), skip=(0, 3))
    found = start_points(config_with(start_neutral=5, trials=21), space)
    assert found == [*neutral_points(space, 5), *axis_points(space, 2)]
    assert start_points(config_with(start_neutral=9, trials=21), space) == neutral_points(space, 9)


def test_values_that_do_nothing_are_known_of_variables_that_have_them() -> None:
    space = make_space(deit("tiny"), budget=(0.3, 0.9), skip=(0, 3), mlp_weight=(0.5, 2.0), lr=(1e-4, 1e-2))
    assert space.idle == {"budget": 0.9, "skip": 0, "mlp_weight": 1.0}
    bits = make_space(deit("tiny"), budget=(0.3, 0.9), encoding="full").idle
    assert bits["skip.3"] == 0
    assert bits["mixer.3"] == "attn"


def test_the_budget_is_looked_at_in_equal_steps_or_equal_factors() -> None:
    for scale, middle in (("linear", 0.5), ("log", 0.3)):
        space = make_space(deit("tiny"), budget=(0.1, 0.9), budget_scale=scale)
        assert next(v for v in space.variables if v.name == "budget").nearest(None) == pytest.approx(middle)


def test_one_axis_needs_no_looking_along() -> None:
    assert axis_points(make_space(deit("tiny"), budget=(0.2, 0.9)), 10) == []
    assert axis_points(make_space(deit("tiny"), encoding="full"), 10) == []


def config_with(**search: object) -> SearchConfig:
    return SearchConfig.model_validate({**TINY, "name": "tiny", "search": {**TINY["search"], **search}})


def test_the_user_s_points_come_first_and_are_checked() -> None:
    space = make_space(deit("tiny"), budget=(0.3, 1.0), skip=(0, 3))
    own = {"budget": 0.5, "skip": 2}
    assert start_points(config_with(start=[own], trials=6), space) == [own, *axis_points(space, 2)]
    assert start_points(config_with(start=[own], start_published=True), space)[0] == own
    assert len(start_points(config_with(start=[own], start_published=True), space)) > 3
    with pytest.raises(UserError, match=r"search.start: skip = 7: must lie in \[0, 3\]"):
        start_points(config_with(start=[{"budget": 0.5, "skip": 7}]), space)


def test_another_front_is_begun_with(tmp_path: Path) -> None:
    space = make_space(deit("tiny"), budget=(0.3, 1.0), skip=(0, 3))
    run = other_run(tmp_path / "other", {"budget": 0.6, "skip": 1})
    assert start_points(config_with(start_from=str(run.path)), space)[0] == {"budget": 0.6, "skip": 1}
    other_run(tmp_path / "wide", {"budget": 0.6, "skip": 1, "conv": 3})
    with pytest.raises(UserError, match=r"search.start_from .*wide: conv = 3: must lie in \[0, 0\]"):
        start_points(config_with(start_from=str(tmp_path / "wide")), space)


def other_run(path: Path, point: dict[str, float]) -> Run:
    run = make_run(path)
    run.trial("r0-0000").mkdir()
    result = Result(
        trial=0,
        top1=90.0,
        zero_shot=9.0,
        macs=6,
        params=5,
        arch_hash="",
        point=point,
        seconds=1.0,
        key="",
        has_model=True,
    )
    run.write_result("r0-0000", result=result)
    run.update_front([result], {"r0-0000"}, set())
    return run
