"""Configurations that are right by themselves and would waste a search are refused before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError
from prunesweep.search import run_search
from prunesweep.search.config import SearchConfig

MERGING = {"keep_rate": [0.5, 1.0]}
HUGE = {"patch_size": 2, "embed_dim": 300_000, "depth": 2}
START = {"start_methods": ["uvc"]}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"search": {"trials": 4, "rungs": [1, 2, 4]}}, "none reaches rung 2 .4 epochs.: set trials to 9 or more"),
        ({"search": {"trials": 4, "rungs": [1, 2], "reduction_factor": 5.0}}, "none reaches rung 1"),
        ({"space": {"conv": [0, 1], "conv3": [0, 2]}}, "of space.conv, of which there are 1 at most"),
        ({"space": {"conv3": [0, 1]}}, "of which there are 0 at most"),
        ({"space": {"merge_start": [0, 2]}}, "no tokens merge with space.keep_rate"),
        ({"space": {**MERGING, "merge_start": [0, 3]}}, "the source has 3 blocks, so it must not exceed 2"),
        ({"search": START, "start": {"uvc": {"budgets": [0.95]}}}, "0.95 is outside of space.budget"),
        ({"search": {"objectives": ["top1", "latency_ms"]}}, "set space.latency_table"),
        ({"search": {"start": [{"budget": 0.5, "width": 3}]}}, "search.start: width: no variable of this space"),
        ({"search": {"start": [{"budget": 0.5, "skip": 0, "lr": 9.0}]}}, "search.start: lr = 9.0: must lie in"),
        ({"search": {"start_from": ["nowhere"]}}, "nowhere is not a run"),
        ({"space": {"budget": [0.5, 0.5], "skip": [0, 0], "lr": [1e-3, 1e-3]}}, "every axis is fixed"),
        (
            {"source": {"args": {"patch_size": 2, "embed_dim": 300_000, "depth": 2}}},
            "its weights would take .* GiB, this machine has",
        ),
        ({"source": {"args": {"depth": 10**9}}}, "more than 1,000 blocks"),
        ({"space": {"params": [0, 10]}}, "none of 32 points can be built within its windows"),
        ({"source": {"train": {"epochs": 0}}}, "the source would stay untrained"),
        ({"source": {"args": {"num_heads": -2}}}, "cannot be made"),
        ({"source": {"args": {"width": 3}}}, "unexpected keyword argument 'width'"),
        ({"source": {"model": "swin_tiny_patch4_window7_224", "args": {}}}, "has no position embedding"),
        ({"source": {"train": {"epochs": 1, "batch_size": 10**6}}}, "has only 1,347 training images"),
    ],
)
def test_what_would_waste_a_search_is_refused_before_anything_is_made(
    tables: dict[str, Any], message: str, tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    for dry_run in (True, False):
        with pytest.raises(UserError, match=message):
            run_search(tiny(**tables), tmp_path / "run", dry_run=dry_run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tables",
    [
        {"search": {"trials": 9, "rungs": [1, 2, 4]}},
        {"space": {"conv": [0, 2], "conv3": [0, 2], **MERGING, "merge_start": [0, 2]}},
        {"search": {**START, "trials": 1}, "space": {"budget": [0.5, 0.5], "skip": [0, 0], "lr": [1e-3, 1e-3]}},
    ],
)
def test_what_is_worth_a_search_is_not(tables: dict[str, Any], tiny: Callable[..., SearchConfig]) -> None:
    from prunesweep.search.execution.source import open_checked

    open_checked(tiny(**tables))
