"""Tables of a run's models on a narrow terminal."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from prunesweep.search.config import SearchTable
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.report import display
from prunesweep.search.report.display import Display, print_front, print_promoted
from prunesweep.search.report.live import result_line
from prunesweep.search.report.words import counted
from prunesweep.search.store.run import Result
from prunesweep.search.store.study import Study
from prunesweep.training import EvalMetrics
from tests.search.helpers import make_run, make_space

FOLDER = (
    "/a/rather long/path of somebody's/runs/with a name that fills more than one line of eighty/trials/r1-0003/model"
)
SPACE, ONE = make_space(), {"max_concurrent": 1, "seed": 0}
POINT = {"trial": 3, "rung": 1, "epochs": 4, "top1": 98.0, "macs": 500_000, "params": 1_000, "latency_ms": 1.5}


def test_the_front_shows_rung_and_epochs_and_paths_that_can_be_copied() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_front(console, [{**POINT, "model": FOLDER}], 1_000_000)
    lines = console.file.getvalue().splitlines()
    heads = next(line.split() for line in lines if "rung" in line)
    assert heads[:3] == ["trial", "rung", "epochs"]
    row = next(line.split() for line in lines if "98.00" in line)
    assert row == ["3", "1", "4", "98.00", "0.50", "0.500", "0.001", "1.500"]
    assert f"trial 3: {FOLDER}" in lines


@pytest.mark.parametrize(
    ("cost", "of_source", "wanted"),
    [
        ("params", 4_000, ["0.50", "0.001", "0.250", "1.500"]),
        ("latency_ms", 2.0, ["0.50", "0.001", "1.500", "0.750"]),
    ],
)
def test_shares_are_of_the_cost_that_is_searched(cost: str, of_source: float, wanted: list[str]) -> None:
    console = Console(file=io.StringIO(), width=100)
    print_front(console, [{**POINT, "model": FOLDER}], of_source, cost)
    row = next(line.split() for line in console.file.getvalue().splitlines() if "98.00" in line)
    assert row[4:] == wanted


def test_what_is_counted_is_one_or_several() -> None:
    counts = [(1, "1 epoch"), (2, "2 epochs"), (0.5, "0.5 epochs"), (1.0, "1 epoch"), (2_500_000, "2500000 epochs")]
    for number, said in counts:
        assert counted(number, "epoch") == said


def test_promoted_models_have_paths_that_can_be_copied() -> None:
    console = Console(file=io.StringIO(), width=80)
    entry = {"unit": "r1-0003", "top1": 98.5, "searched_top1": 98.0, "ppl": None, "searched_ppl": None}
    entry |= {"macs": 500_000, "params": 1_000, "recipe": "quick", "latency": None, "model": FOLDER}
    print_promoted(console, [entry], 1_000_000)
    assert f"r1-0003: {FOLDER}" in console.file.getvalue().splitlines()


def test_the_front_has_intervals_and_figures_of_low_noise_within_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    figures = EvalMetrics(98.0, agreement=99.25, kl=0.01234, loss=0.05678, images=450)
    timed = {**POINT, **figures.with_interval(), "split": "val", "ranked_by": "loss", "model": "m"}
    plain = {name: value for name, value in timed.items() if name != "latency_ms"}
    for point, last in ((plain, ["99.25", "0.50", "0.500", "0.001"]), (timed, ["0.50", "0.500", "0.001", "1.500"])):
        print_front(console, [point, {**POINT, "model": "older"} if point is timed else point], 1_000_000)
        lines = console.file.getvalue().splitlines()
        row = [line.split() for line in lines if "98.00" in line][-2]
        assert row == ["3", "1", "4", "98.00", "96.2-98.9", "0.0568", "0.0123", *last]
        assert max(len(line) for line in lines if "figures of" not in line) <= 80
        notes = [line for line in lines if "figures of" in line]
        assert {*notes} == {
            "figures of 450 validation images; candidates were compared by loss on them, so they flatter"
        }


def test_the_line_of_a_trial_shows_what_it_is_ranked_by(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    search = SearchTable(trials=12, rungs=(0, 2))
    coordinator = Coordinator(run, Study(run / "study.journal", SPACE.distributions, 0), SPACE, search, **ONE)
    screened = Result(3, 90.0, 90.0, 500_000, 10, "", {"budget": 0.5}, 1.0, loss=0.25, kl=0.125)
    console = Console(file=io.StringIO(), width=200)
    with Display(console).live(coordinator, {"macs": 1_000_000}, (0.3, 0.9)) as changed:
        coordinator.results += [screened, replace(screened, rung=1, epochs=2)]
        changed()
    first, second = console.file.getvalue().splitlines()
    assert first == "[rung 0: 1/12] trial 3: top-1 90.00 %, KL to the source 0.125, 0.500 of the MACs, 1.0 s"
    assert second == "[rung 1: 1/4] trial 3: top-1 90.00 %, loss 0.25, 0.500 of the MACs, 1.0 s"


def test_lines_of_trials_name_the_objectives_in_use_and_have_at_most_120_characters(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    search = SearchTable(
        trials=12345, rungs=(0, 2), objectives=("agreement", "params", "latency_ms"), rank_by="kl", sampler="random"
    )
    study = Study(run / "study.journal", SPACE.distributions, 0, objectives=search.objectives)
    coordinator = Coordinator(run, study, SPACE, SearchTable(trials=12345, rungs=(0, 2)), **ONE)
    coordinator.search = search
    long = Result(
        12344, None, 90.0, 500_000, 10, "", {"budget": 0.5}, 123456.7, agreement=98.765, kl=1.2345e-4, latency_ms=0.5
    )
    coordinator.results.append(long)
    line = result_line(long, coordinator, {"macs": 1_000_000, "params": 40, "latency_ms": 2.0})
    assert "agreement 98.77 %, KL to the source 0.0001234, 0.250 of the params, 0.250 of the latency" in line
    assert "MACs" not in line
    assert len(line) <= 120


def test_the_live_view_says_what_runs_and_prints_results_above_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    study = Study(run / "study.journal", SPACE.distributions, 0)
    coordinator = Coordinator(run, study, SPACE, SearchTable(trials=4, rungs=(1, 3), reduction_factor=2), **ONE)
    coordinator.max_concurrent = 2
    for _ in range(2):
        assert coordinator.next() is not None
    epoch = {"event": "epoch", "epoch": 2, "epochs": 3, "loss": 0.125}
    (run.trial("r0-0001") / "metrics.jsonl").write_text(json.dumps(epoch) + "\n")
    run.begins("r0-0001")
    coordinator.results.append(replace(result_of(7), seconds=8.0))
    source = {"macs": 1_000, "top1": 90.0}
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    with Display(console).live(coordinator, source, (0.3, 0.9)) as changed:
        coordinator.results.append(replace(result_of(8), seconds=8.0))
        changed()
    text = console.file.getvalue()
    assert "[rung 0: 2/4] trial 8: top-1 90.00 %, 0.100 of the MACs, 8.0 s" in text
    view = text[text.rindex("rung 0: 2/4, rung 1: 0/2 done") :]
    # what is left of two of 8 s, and two of three epochs for one, two at a time
    assert re.search(r"ETA 00:3[0-5]", " ".join(view.split()))
    assert "from 0 % top-1 at the source's MACs" in " ".join(view.split())
    assert "1 running, 1 waiting for a worker, 0 failed" in " ".join(view.split())
    assert re.search(r"trial 0 on rung 0, waiting for a worker for 00:0\d", view)
    assert re.search(r"trial 1 on rung 0, epoch 2 of 3, loss 0\.125, 00:0\d", view)


def test_work_without_a_terminal_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that takes long and tells nothing meanwhile, too."""
    monkeypatch.setattr(display, "SILENCE", 0.05)
    console = Console(file=io.StringIO(), width=200)
    with Display(console).progress() as progress:
        time.sleep(0.1)
        progress("training the source", 0.25, "loss 0.5")
        time.sleep(0.2)
        progress("training the source", 1.0, "top-1 90 %")
        time.sleep(0.1)
    lines = list(dict.fromkeys(console.file.getvalue().splitlines()))
    assert lines == [
        "preparing: 00:00 elapsed",
        "training the source ...",
        "training the source: 25%, 00:00 elapsed, ETA 00:00  loss 0.5",
        "training the source: top-1 90 %",
        "after training the source: 00:00 elapsed",
    ]


def test_the_end_of_a_session_says_what_its_time_went_into(tmp_path: Path) -> None:
    """Computing models and training are the work; what is left over, of all workers, is overhead."""
    run, table = make_run(tmp_path / "run"), SearchTable(trials=3)
    coordinator = Coordinator(run, Study(run / "journal", SPACE.distributions, 0), SPACE, table, **ONE)
    coordinator.seconds = 0.3
    times = [(4.0, 0.0), (2.0, 3.0), (1.0, 8.0)]  # of the first result it was another session's
    coordinator.results = [
        replace(result_of(i), computing_seconds=own, training_seconds=training)
        for i, (own, training) in enumerate(times)
    ]
    console = Console(file=io.StringIO(), width=300)
    Display(console).overhead(coordinator, before=1, elapsed=10.0, whole=20.0)
    text = console.file.getvalue()
    assert (
        "2 units in 00:10: of the workers' time 15% went into computing and measuring models, 55% into training, 30%"
        in text
    )
    assert "the driver spent 0.150 s on each unit, 1.5% of that time" in text


def result_of(number: int) -> Result:
    point: dict[str, float | int | str] = {"budget": 0.5}
    return Result(number, 90.0, 80.0, 100, 10, "a", point, 9.0)
