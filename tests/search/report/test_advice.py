"""What a search's results say about its settings."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from prunesweep.models import cost, cut_arch, save
from prunesweep.models.io.files import write_text
from prunesweep.search.config import SearchConfig, parse_config
from prunesweep.search.report.advice import advice, advise
from prunesweep.search.report.display import Display
from prunesweep.search.store.front import hypervolume
from prunesweep.search.store.run import Result, Run
from tests.generate import random_model
from tests.search.helpers import ARCH, make_run, make_space

MACS = cost(ARCH).macs
SPACE = {"budget": [0.1, 0.9], "skip": [0, 2], "keep_rate": [0.5, 1.0], "mlp_weight": [0.5, 2.0]}


def settings(rank_by: str = "kl", **space: Any) -> SearchConfig:
    data = {
        "name": "r",
        "data": {"name": "digits"},
        "source": {"model": "vit_tiny_patch16_224", "pretrained": True},
        "space": {**SPACE, **space},
        "search": {"trials": 40, "rank_by": rank_by, "rungs": [0, 3]},
    }
    return parse_config(data, "test")


def results(
    count: int = 40,
    kl: Callable[[float, dict[str, float]], float] = lambda share, _: 0.01 / share,
    shares: Callable[[float], float] = lambda place: 0.1 * 9**place,
    top1: Callable[[float], float] = lambda share: 90 + 9 * share,
    **fixed: float,
) -> list[Result]:
    """Candidates spread over the budgets, with random values of all variables but the ``fixed`` ones."""
    rng, found = np.random.default_rng(0), []
    for trial in range(count):
        share = shares(trial / (count - 1))
        drawn = {"skip": int(rng.integers(3)), "keep_rate": rng.uniform(0.5, 1), "mlp_weight": 2 ** rng.uniform(-1, 1)}
        point = {"budget": share, **drawn, **fixed}
        quality = {"kl": kl(share, point), "images": 200}
        found.append(Result(trial, top1(share), 50.0, round(share * MACS), 1, f"a{trial}", point, 2.0, **quality))
    return found


def said(config: SearchConfig, found: list[Result], **source: float) -> list[str]:
    members = config.search.ranking.front(found)
    front = [{"trial": r.trial, **r.figures.with_interval()} for r in members]
    return advise(config, ARCH, found, found, front, {"macs": MACS, **source})


def lines(found: list[str], word: str) -> list[str]:
    return [line for line in found if word in line]


@pytest.mark.parametrize(
    ("values", "wider"),
    [
        ({"mlp_weight": 2.0}, "[0.5, 4]"),
        ({"mlp_weight": 0.5}, "[0.25, 2]"),
        ({"skip": 2}, "[0, 3]"),
        ({"keep_rate": 0.5}, "[0.25, 1]"),
    ],
)
def test_a_front_at_the_end_of_a_range_asks_for_a_wider_one(values: dict[str, float], wider: str) -> None:
    ((name, value),) = values.items()
    assert lines(said(settings(), results(**values)), "end of its range") == [
        f"40 of 40 members of the front have {name} = {value:g}, the end of its range: widen it, for example "
        f"space.{name} = {wider}"
    ]
    settings(**{name: json.loads(wider)})  # which is allowed


def test_a_front_at_the_source_s_own_value_or_where_nothing_wider_is_allowed_asks_for_nothing() -> None:
    assert not lines(said(settings(), results(keep_rate=1.0, skip=0)), "end of its range")
    assert not lines(said(settings(skip=[0, 3]), results(skip=3)), "end of its range")  # one of four blocks stays


def test_a_variable_that_changes_nothing_at_equal_cost_is_named() -> None:
    found = said(settings(), results(kl=lambda share, point: 0.01 / share * (1 + point["skip"]) * point["mlp_weight"]))
    (line,) = lines(found, "no effect")
    assert line.startswith("no effect of keep_rate on kl was seen among 40 candidates")


def test_of_effects_nothing_is_said_of_few_results_or_where_no_variable_shows_one() -> None:
    assert not lines(said(settings(), results(20)), "no effect")
    every = results(kl=lambda share, p: 0.01 / share * (1 + p["skip"]) * p["mlp_weight"] * p["keep_rate"] ** 3)
    assert not lines(said(settings(), every), "no effect")


def test_parts_of_the_budget_window_without_members_are_named() -> None:
    found = said(settings(), results(shares=lambda place: 0.2 + 0.05 * place if place < 0.5 else 0.4 + 0.5 * place))
    low, gap = lines(found, "of the source's MACs")
    assert low.startswith("the front ends at 0.200 of the source's MACs, the budget window at 0.1: no candidate there")
    assert gap.startswith("no member of the front has 0.224 to 0.656 of the source's MACs: no candidate there")
    assert "space.budget = [0.224, 0.656]" in gap
    beaten = results(kl=lambda share, _: 0.01 / share if share < 0.3 or share > 0.7 else 1.0)
    (gap,) = lines(said(settings(), beaten), "of the source's MACs")
    assert "none better than what costs less" in gap
    assert not lines(said(settings(), results()), "of the source's MACs")


def test_a_front_of_the_few_that_were_promoted_asks_for_more_promotions() -> None:
    found = results(6)
    found[0] = dataclasses.replace(found[0], rung=1)
    front = [{"trial": 0, **found[0].figures.with_interval()}]
    source = {"macs": MACS}
    assert lines(advise(settings(), ARCH, found, found, front, source), "promoted") == [
        "no member of the front has 0.100 to 0.900 of the source's MACs: 4 candidates there, none of them "
        "promoted: more trials, or a smaller search.reduction_factor, promote more"
    ]
    found[3] = dataclasses.replace(found[3], rung=1)
    assert not lines(advise(settings(), ARCH, found, found, front, source), "promoted")


def test_neighbours_within_each_other_s_intervals_are_noise() -> None:
    (line,) = lines(said(settings(), results()), "told apart")
    assert line.startswith("top-1 of 39 of 39 neighbours of the front cannot be told apart on 200 images")
    assert "KL" in line
    (line,) = lines(said(settings("objective"), results()), "told apart")
    assert "search.rank_by = 'auto'" in line
    assert not lines(said(settings(), results(5, top1=lambda share: 100 * share)), "told apart")


def test_one_more_hour_follows_the_growth_so_far() -> None:
    found = results()
    (line,) = lines(said(settings(), found), "one more hour")
    before, after = (float(line.split(word)[1].split()[0]) for word in ("from", "to about"))
    assert before == pytest.approx(hypervolume(found, {"macs": MACS}), abs=1e-4)
    assert before < after <= 1
    assert "about 1800 candidates" in line  # of two seconds
    assert not lines(said(settings(), found[:10]), "one more hour")


def test_results_that_are_no_numbers_and_empty_fronts_are_nothing_to_go_by() -> None:
    assert said(settings(), []) == []
    broken = [
        Result(i, math.nan, 1.0, MACS // 2, 1, f"a{i}", {"skip": 1}, 1.0, kl=math.nan, images=9) for i in range(40)
    ]
    assert not lines(said(settings(), broken), "no effect")


def test_advice_is_kept_with_the_run_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "r")
    found = advice(run)
    assert lines(found, "skip = 1, the end of its range")
    assert run.status()["advice"] == []
    run.write_advice(found)
    assert Run(run.path).status()["advice"] == found
    Display(Console(width=200)).advice(found)
    assert capsys.readouterr().out.count("advice: ") == len(found)
    write_text(run / "advice.json", "[")
    assert run.advice() == []


def made(path: Path) -> Run:
    """A run of real architectures, all of which drop the most blocks that they may."""
    run, space = make_run(path, trials=5), make_space(skip=(0, 1))
    config = settings(budget=[0.3, 0.9], skip=[0, 1], keep_rate=[1.0, 1.0], mlp_weight=[1.0, 1.0])
    write_text(run / "search.toml", config.to_toml())
    save(random_model(ARCH, 0), run / "source")
    for trial in range(5):
        point = {"budget": 0.3 + 0.1 * trial, "skip": 1, "lr": 1e-3}
        candidate = space.decode(point)
        arch = cut_arch(ARCH, candidate.decision)  # type: ignore[arg-type]
        folder = run.trial(f"r0-{trial:04d}")
        (folder / "model").mkdir(parents=True)
        result = Result(
            trial, 80.0 + trial, 50.0, cost(arch).macs, 1, arch.hash, point, 1.0, kl=1 / (1 + trial), images=100
        )
        run.write_result(result.id, result=result)
    return run
