"""Searches whose classes are uneven, for the mean of the classes' recalls in place of top-1."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from prunesweep.models import UserError
from prunesweep.search import run_search
from prunesweep.search.config import SearchConfig
from prunesweep.search.store.front import Ranking
from prunesweep.search.store.run import Run
from tests.search.in_process import without_ray


def test_candidates_are_compared_by_it() -> None:
    """The loss is a mean over images, most of which are of the large classes."""
    ranking = Ranking(("balanced", "macs"), "auto")
    assert ranking.names(0) == ranking.names(3) == ("balanced", "macs")
    assert Ranking(("balanced", "macs"), "kl").names(3) == ("kl", "macs")


@pytest.mark.slow
def test_a_search_for_balanced_accuracy(
    tiny: Callable[..., SearchConfig], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    console = Console(file=StringIO(), width=200)
    config = tiny(search={"trials": 2, "objectives": ["balanced", "macs"]})
    result = run_search(config, runs / "balanced", console=console)
    assert result is not None
    assert result.front
    for point in result.front:
        assert point["ranked_by"] == "balanced"
        assert 0 < point["balanced"] <= 100
    for own in Run.existing(runs / "balanced").results():
        assert own.balanced is not None
        assert own.figures.balanced == own.balanced
    assert ": balanced " in console.file.getvalue()  # type: ignore[attr-defined]


def test_texts_have_no_classes(tiny: Callable[..., SearchConfig]) -> None:
    with pytest.raises(UserError, match="balanced, the mean of the classes' recalls, may stand for top1"):
        tiny(search={"objectives": ["top1", "balanced", "macs"]})
