"""How fast a front is, measured at the end of a search."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prunesweep.models import arch_of, cost, load
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution import speed
from prunesweep.search.execution.speed import measure_speed
from prunesweep.search.report.page_data import page_data
from prunesweep.search.store.run import Result, Run
from tests.launch.test_cli import call
from tests.search.execution.test_task import nothing
from tests.search.helpers import ARCH, make_run, put_model


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with two members in its front; the first one's model is the source itself."""
    found = make_run(tmp_path / "run", trials=2)
    put_model(found / "source")
    whole = cost(ARCH)
    for number, (top1, macs) in enumerate([(80.0, whole.macs // 2), (90.0, whole.macs)]):
        put_model(found.trial(f"r0-000{number}") / "model")
        arch = arch_of(load(found / "source")).hash
        result = Result(number, top1, 50.0, macs, whole.params, arch, {"budget": 0.5}, 1.0, key=f"k{number}")
        (found.trial(result.id) / "arch.json").write_text(ARCH.to_json())
        found.write_result(result.id, result=result)
    found.write_front()
    return found


def test_the_speed_of_a_front_is_measured_kept_and_shown(
    run: Run,
    tiny: Callable[..., SearchConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    assert page_data(run)["speed"] == json.loads(call(capsys, "front", run.path, "--json")[1])[0]["speed"] == []
    measure_speed(run.path, tiny(), nothing)
    rows = run.read_speed()
    assert [(row.unit, row.batch) for row in rows] == [(f"r0-000{i}", batch) for batch in (1, 64) for i in (0, 1)]
    assert all(row.median_ms > 0 and row.source_ms > 0 for row in rows)
    shown = page_data(run)["speed"]
    assert [row["promised"] for row in shown] == [pytest.approx(2.0, rel=0.01), 1.0] * 2
    first, second = json.loads(call(capsys, "front", run.path, "--json")[1])
    assert [(row["batch"], row["median_ms"]) for row in second["speed"]] == [
        (row.batch, row.median_ms) for row in rows if row.unit == "r0-0001"
    ]
    assert len(first["speed"]) == 2
    monkeypatch.setattr(speed, "measure_all", None)  # all members are measured
    measure_speed(run.path, tiny(), nothing)
    (run / "speed.json").write_text((run / "speed.json").read_text().replace("64", "65"))
    with pytest.warns(UserWarning, match="speed.json is damaged: it has changed since it was written"):
        assert page_data(Run(run.path))["speed"] == []
    with pytest.raises(TypeError):
        measure_speed(run.path, tiny(), nothing)  # again
