"""No terminal is so narrow that a path or a figure is broken or cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prunesweep.launch.doctor import Finding
from prunesweep.models import save
from prunesweep.search.report.display import print_front
from tests.generate import random_model
from tests.launch.test_cli import call
from tests.models.test_in_other_code import KINDS

WIDTHS = ("60", "80", "200")
PLACE = "a/folder/whose/name/is/longer/than/any/terminal/has/columns/so/that/it/would/be/wrapped/if/it/were/in/a/table"


def member(**more: Any) -> dict[str, Any]:
    figures = {"top1": 97.11, "balanced": 91.02, "loss": 0.09501, "kl": 0.05193, "agreement": 97.33}
    ends = {"top1_low": 95.1, "top1_high": 98.3, "macs": 460_000, "params": 26_000, "images": 450}
    return {"trial": 1000, "rung": 1, "epochs": 30, **figures, **ends, "model": PLACE, **more}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"latency_ms": 12.345, "test": "imagefolder:x", "test_top1": 95.2, "test_images": 9},
        {"quality": 0.1, "measure": "worst_class"},
    ],
)
def test_a_front_leaves_columns_out_before_it_cuts_figures(
    width: str, more: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_front(Console(width=int(width)), [member(**more)], 11_000_000)
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert f"trial 1000: {PLACE}\n" in out
    assert ("no room for" in out) == (width != "200")
    assert all(text in out for text in ("97.11", "0.042", "0.026"))


@pytest.mark.parametrize("width", WIDTHS)
def test_commands_print_paths_whole(
    width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    place = tmp_path / PLACE
    place.parent.mkdir(parents=True)
    save(random_model(KINDS["attention"], 0, torch.float32), place)
    code, out, _ = call(capsys, "bench", place, "--batch", "1", "--seconds", "0", "--threads", "1")
    assert code == 0
    assert f"source: {place}\n" in out
    assert all(len(line) <= int(width) for line in out.splitlines() if "\u2502" in line)

    from prunesweep.launch import doctor

    monkeypatch.setattr(doctor, "check_here", lambda: iter([Finding("room", "wrong", str(place), f"rm -r {place}")]))
    code, out, _ = call(capsys, "doctor")
    assert code == 1
    assert f"wrong    room: {place}\n" in out
    assert f"         to do: rm -r {place}\n" in out
