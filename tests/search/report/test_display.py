"""Tables of a run's models on a narrow terminal."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from prunesweep.search.report.display import print_front, print_promoted

FOLDER = (
    "/a/rather long/path of somebody's/runs/with a name that fills more than one line of eighty/trials/r1-0003/model"
)
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


def test_promoted_models_have_paths_that_can_be_copied() -> None:
    console = Console(file=io.StringIO(), width=80)
    entry = {"unit": "r1-0003", "top1": 98.5, "searched_top1": 98.0, "ppl": None, "searched_ppl": None}
    entry |= {"macs": 500_000, "params": 1_000, "recipe": "quick", "latency": None, "model": "promoted/r1-0003/model"}
    run = Path(FOLDER).parents[2]
    print_promoted(console, [entry], 1_000_000, run)
    assert f"r1-0003: {run}/promoted/r1-0003/model" in console.file.getvalue().splitlines()
