"""Searches that start from what methods decide while they train: ``search.start_methods``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prunesweep.launch.cli import app
from prunesweep.models import BlockCut, Cut, UserError, arch_of, cost, cut_arch, load, load_provenance, read_arch
from prunesweep.search import run_search
from prunesweep.search.config import SearchConfig, parse_config
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.prepare import prepare_search
from prunesweep.search.execution.reopen import space_of
from prunesweep.search.execution.source import LoadedSource, prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.space.space import Space
from prunesweep.search.space.warm_start import met_points, nearest_point, proposed_points, start_points
from prunesweep.search.store.run import Run
from prunesweep.search.store.study import Study
from prunesweep.training.jobs.proposal import Proposal
from tests.conftest import TINY
from tests.launch.test_cli import call
from tests.search.execution.test_task import nothing
from tests.search.helpers import ARCH, make_space

Tiny = Callable[..., SearchConfig]
METHODS = ("uvc", "spvit", "nvit-iterative")
RECIPE = {"epochs": 1, "batch_size": 64}
START: dict[str, Any] = {
    "uvc": {"recipe": RECIPE, "settings": {"warmup_epochs": 0}},
    "spvit": {"recipe": RECIPE, "budgets": [0.6]},
    "nvit-iterative": {"recipe": RECIPE, "budgets": [0.8, 0.6]},
}
HEADS = BlockCut(
    qk=(tuple(range(8, 16)),), v=(tuple(range(8, 13)),), mlp=tuple(range(0, 64, 2))
)  # the second of two heads, five of its value channels, every second hidden unit
UVC = Cut(blocks=(BlockCut(), BlockCut(keep=False), HEADS, BlockCut()))
SPVIT = Cut(
    blocks=(
        BlockCut(mixer="conv1x1", mlp=tuple(range(3, 40))),
        BlockCut(mixer="conv3x3"),
        BlockCut(mixer="none", mlp=tuple(range(20))),
        BlockCut(),
    )
)


def started(tiny: Tiny, **search: Any) -> SearchConfig:
    return tiny(search={"start_methods": list(METHODS), "rungs": [0, 1], **search}, start=START)


@pytest.fixture(scope="module")
def prepared(runs: Path) -> LoadedSource:
    """The tiny search's source, and what all three methods decide about it."""
    search = {**TINY["search"], "start_methods": list(METHODS)}
    return prepare(parse_config({**TINY, "search": search, "start": START}, "tiny"), runs / "cache", nothing)


def begin(config: SearchConfig, prepared: LoadedSource, path: Path) -> tuple[Run, SearchConfig]:
    """A run's folder with the points that its configuration asks to start from."""
    points = tuple(dict(p) for p in start_points(config, prepared.space, prepared.proposals))
    search = config.search.model_copy(update={"start": points, "start_methods": ()})
    config = config.model_copy(update={"search": search, "start": {}})
    return Run(path), create_run(Run(path), config, prepared)


def coordinator_of(run: Run, config: SearchConfig) -> Coordinator:
    space = space_of(run, config)
    study = Study(run / "study.journal", space.distributions, 0, start=config.search.start)
    return Coordinator(run, study, space, config.search, max_concurrent=9, seed=0)


def file_of(folder: Path, method: str, decision: Cut, budget: float = 0.5) -> Path:
    path = folder / f"{method}.json"
    Proposal(decision, budget, {"method": method}).save(path)
    return path


# --- decisions in a space ---


@pytest.mark.parametrize(("method", "decision"), [("uvc", UVC), ("spvit", SPVIT)])
def test_a_decision_is_a_candidate_as_it_is_and_its_blocks_are_a_point_of_the_full_space(
    method: str, decision: Cut, tmp_path: Path
) -> None:
    space = make_space(encoding="full", skip=(0, 0), budget=(0.1, 1.0))
    file, small = file_of(tmp_path, method, decision), cut_arch(ARCH, decision)
    point, *others = proposed_points(space, [file])
    found = space.decode(point)
    assert found.decision == decision
    assert (found.arch, found.cost) == (small, cost(small))
    assert point["budget"] == pytest.approx(found.cost.macs / space.source_cost.macs)

    for near in ({name: value for name, value in point.items() if name != "model"}, *others):
        blocks = space.decode(near).arch.blocks
        assert [(b.src, b.mixer) for b in blocks] == [(b.src, b.mixer) for b in small.blocks]
    assert [other["budget"] for other in others] == ([0.75, 0.3] if method == "spvit" else [])


def test_a_projected_search_keeps_all_heads_of_a_decision(tmp_path: Path) -> None:
    own = make_space(budget=(0.1, 1.0))
    space = Space(own.table, ARCH, own.scores, projected=True)
    found = space.decode(proposed_points(space, [file_of(tmp_path, "uvc", UVC)])[0])
    assert isinstance(found.decision, Cut)
    assert [block.heads for block in found.arch.blocks] == [2, 2, 2]
    assert [(b.src, b.qk, b.v, b.mlp) for b in found.arch.blocks][1] == (2, 4, (3, 2), 32)
    assert found.cost == cost(cut_arch(ARCH, UVC))


def test_decisions_outside_of_the_window_are_left_out(tmp_path: Path) -> None:
    space = make_space(budget=(0.8, 1.0))
    with pytest.warns(
        UserWarning, match=r"left out: search.start_methods .*uvc.json: 0\.\d+ of the source's MACs: out"
    ):
        assert proposed_points(space, [file_of(tmp_path, "uvc", UVC)]) == []


def test_a_compact_space_has_as_many_blocks_and_convolutions(tmp_path: Path) -> None:
    space = make_space(budget=(0.1, 1.0), conv=(0, 3), conv3=(0, 2))
    assert nearest_point(space, cut_arch(ARCH, UVC), ARCH)["skip"] == 1
    assert nearest_point(space, cut_arch(ARCH, SPVIT), ARCH)["conv"] == 2


# --- what is asked for ---


@pytest.mark.parametrize(
    ("search", "start", "message"),
    [
        (
            ["uvcc"],
            {},
            "search.start_methods = ['uvcc']: unknown method 'uvcc'; known: uvc, spvit, nvit-iterative. did",
        ),
        (["taylor"], {}, "method 'taylor' scores widths once; needed here is one of uvc, spvit, nvit-iterative"),
        (["uvc", "uvc"], {}, "names a method twice"),
        (["uvc"], {"spvit": {}}, "start: spvit: is not in search.start_methods = ['uvc']"),
        (["uvc"], {"uvc": {"recipe": {"epochs": 0}}}, "start.uvc.recipe: epochs = 0: the method decides while it"),
        (["uvc"], {"uvc": {"recipe": "quik"}}, "start.uvc.recipe = 'quik': unknown recipe 'quik'"),
        (["uvc"], {"uvc": {"settings": {"ramp": 3}}}, "uvc.settings: method 'uvc': unknown setting 'ramp'"),
        (["uvc"], {"uvc": {"budgets": [1.5]}}, "start.uvc.budgets.0 = 1.5: input should be less than 1"),
        (
            ["uvc"],
            {"uvc": {"budgts": [0.5]}},
            "unknown key; known here: recipe, budgets, settings. did you mean 'budgets'",
        ),
    ],
)
def test_what_cannot_be_is_refused(tiny: Tiny, search: list[str], start: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        tiny(search={"start_methods": search}, start=start)
    assert message in str(error.value)


def test_budgets_and_recipes_have_defaults(tiny: Tiny) -> None:
    config = tiny(search={"start_methods": list(METHODS)}, space={"budget": [0.2, 0.6]})
    assert {name: table.budgets for name, table in config.start.items()} == {
        "uvc": (0.5, 0.3),
        "spvit": (0.3,),
        "nvit-iterative": (0.5, 0.3),
    }
    assert {table.recipe.epochs for table in config.start.values()} == {10}
    given = tiny(search={"start_methods": ["uvc"]}, start={"uvc": {"recipe": {"recipe": "uvc_stage1", "lr": 1e-3}}})
    assert (given.start["uvc"].recipe.epochs, given.start["uvc"].recipe.lr) == (30, 1e-3)
    assert parse_config(json.loads(json.dumps(given.model_dump(mode="json"))), "again") == given


def test_a_method_that_does_not_serve_the_family_is_refused_before_anything_is_made(tiny: Tiny, tmp_path: Path) -> None:
    table = tiny(search={"start_methods": ["spvit"]}).model_dump(exclude_none=True)
    table["source"] |= {"model": "swinv2_tiny_window8_256", "pos_embed_std": None}
    table["source"]["args"] = {
        "patch_size": 1,
        "window_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
    }
    table["space"] |= {"skip": [0, 0]}
    with pytest.raises(
        UserError, match="search.start_methods, 'spvit': method 'spvit' serves families vit, .* uvc, nvit"
    ):
        prepare(parse_config(table, "swin"), tmp_path / "cache", nothing)
    assert not (tmp_path / "cache").exists()


# --- a run ---


def test_every_method_proposes_what_its_budgets_ask_for(prepared: LoadedSource, tiny: Tiny) -> None:
    found = [Proposal.load(path) for path in prepared.proposals]
    assert [(own.method, round(own.budget, 4)) for own in found] == [
        *(("uvc", share) for share in (0.75, 0.5, 0.3)),
        ("spvit", 0.6),
        *(("nvit-iterative", share) for share in (0.8, 0.6)),
    ]
    points = start_points(started(tiny), prepared.space, prepared.proposals)
    assert [point.get("model") for point in points[:6]] == [str(path) for path in prepared.proposals]
    assert list(met_points(prepared.space, points)[:6]) == points[:6]


def test_a_decision_is_a_trial_that_is_computed_from_the_source(
    prepared: LoadedSource, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = started(tiny)
    run, config = begin(config, prepared, tmp_path / "run")
    coordinator = coordinator_of(run, config)
    unit = coordinator.next()
    assert unit is not None
    assert unit.given == "given/0.json"
    decision = run.read_cut(unit.number)
    assert decision == prepared.space.decode({**unit.point, "model": str(run / unit.given)}).decision
    assert coordinator_of(run, config).next() == unit  # of a driver that died
    (run.trial(unit.id) / "cut.json").unlink()
    assert coordinator_of(run, config).next() == unit  # and of one whose decision is lost, too
    assert run.read_cut(unit.number) == decision

    result = run_task(run.path, unit)["result"]
    assert (result["macs"], result["given"]) == (cost(read_arch_of(run, unit.id)).macs, "given/0.json")
    higher = dataclasses.replace(unit, rung=1)
    run.trial(higher.id).mkdir()
    assert run_task(run.path, higher)["state"] == "finished"
    facts = load_provenance(run.trial(higher.id) / "model")
    assert (facts["method"], facts["given"]) == ("uvc", "given/0.json")
    assert arch_of(load(run.trial(higher.id) / "model")).hash == unit.arch_hash
    (row,) = run.front()
    assert row["proposed_by"] == "uvc"
    app(["show", str(run / row["model"])], standalone_mode=False)
    assert "began in a search as given/0.json, by method uvc" in capsys.readouterr().out


def read_arch_of(run: Run, unit: str) -> Any:
    return cut_arch(read_arch(run / "source"), run.read_cut(int(unit.rpartition("-")[2])) or Cut(blocks=()))


def test_a_dry_run_trains_no_method_and_says_which_it_would(
    prepared: LoadedSource, tiny: Tiny, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunesweep.training.jobs.deciding.decide_while_training", None)
    text = StringIO()
    config = tiny(search={"start_methods": ["uvc"]}, start={"uvc": {"recipe": {"epochs": 7}, "budgets": [0.4, 0.5]}})
    assert run_search(config, runs / "dry", dry_run=True, console=Console(file=text, width=200)) is None
    assert "first, unless the cache has it, uvc decides in 1 x 7 epochs for 0.4, 0.5 of the MACs" in text.getvalue()
    found = prepare_search(started(tiny), runs / "cache", nothing, decide=False)
    assert found.proposals == prepared.proposals


@pytest.mark.slow
def test_a_search_begins_with_the_decisions_of_three_methods(
    tiny: Tiny, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_search(started(tiny, trials=8, reduction_factor=2.0), runs / "started")
    assert result is not None
    assert result.finished
    run = Run(result.path)
    screened = [r for r in run.results() if r.given is not None and r.rung == 0]
    assert {run.made_by(str(r.given)) for r in screened} == set(METHODS)
    assert all(0.29 < r.macs / run.metadata()["source"]["macs"] <= 0.9 for r in screened)
    code, text, _ = call(capsys, "front", run.path, "--json")
    assert code == 0
    rows = json.loads(text)
    assert {row["proposed_by"] for row in rows if "proposed_by" in row} <= set(METHODS)
