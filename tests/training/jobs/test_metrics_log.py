from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from prunesweep.training import Epoch
from prunesweep.training.jobs.metrics_log import MetricsLog, StepRate


def test_what_a_method_says_is_logged(tmp_path: Path) -> None:
    facts = {"macs": 0.75, "skip": "attn 3"}
    with MetricsLog.beside(tmp_path) as log:
        log.epoch(Epoch(1, 2, 0.5, 90.0, 99.0, 1e-3, 100.0))
        log.epoch(Epoch(2, 2, 0.4, 91.0, 99.0, 1e-3, 100.0, facts))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["facts"] for line in lines] == [{}, facts]
    assert Epoch(**lines[1]).facts == facts
    (events,) = (tmp_path / "tb").iterdir()
    assert b"facts/macs" in events.read_bytes()
    assert b"facts/skip" not in events.read_bytes()  # no number


def test_the_rate_is_that_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    rate = StepRate(batch_size=64, window=10.0)
    assert rate.step(1) is None
    clock[0] = 1.0
    assert rate.step(3) == (128.0, 2.0)
    for second in range(2, 21):  # four updates a second from now on: after ten seconds nothing else counts
        clock[0] = float(second)
        found = rate.step(3 + 4 * (second - 1))
    assert found == (256.0, 4.0)
    rate.pause()  # for an evaluation
    clock[0] = 100.0
    assert rate.step(80) is None
    clock[0] = 101.0
    assert rate.step(82) == (128.0, 2.0)


def test_a_log_of_events(tmp_path: Path) -> None:
    """A unit's: every line has a time and a name; a log that is opened again goes on."""
    path, epoch = tmp_path / "trial" / "metrics.jsonl", Epoch(1, 1, 0.5, 90.0, 99.0, 1e-3, 100.0)
    begun = time.time()
    for resumed in (False, True):
        with MetricsLog(path, tmp_path / "tb", events=True) as log:
            log.event("start", resumed=resumed)
            log.epoch(epoch)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "epoch"] * 2
    assert [line["resumed"] for line in lines[::2]] == [False, True]
    assert begun <= lines[0]["time"] <= lines[-1]["time"] <= time.time()
    values = {key: value for key, value in lines[1].items() if key not in ("time", "event")}
    assert Epoch(**values) == epoch


def test_a_log_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    with MetricsLog.beside(tmp_path / "work"):
        pass
    assert list(tmp_path.iterdir()) == []
