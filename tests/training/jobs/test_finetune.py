from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import timm

from prunesweep.models import UserError, save
from prunesweep.training import Epoch, Recipe
from prunesweep.training.jobs.finetune import Finetuning, finetune
from prunesweep.training.jobs.metrics_log import MetricsLog, StepRate
from prunesweep.training.jobs.placement import Placement, worker_range

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}


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


@pytest.mark.parametrize(("given", "found"), [("1", (1, 1)), ("4", (4, 4)), ("2-4", (2, 4)), ("3-3", (3, 3))])
def test_ranges_of_workers(given: str, found: tuple[int, int]) -> None:
    assert worker_range(given) == found


@pytest.mark.parametrize("given", ["0", "4-2", "-2", "2-", "two", "1-2-3", ""])
def test_what_is_no_range(given: str) -> None:
    with pytest.raises(UserError, match=f"--workers {given}: must be a number from 1 on, or a range such as 2-4"):
        worker_range(given)


def test_batches_must_fit_every_number_of_workers(tmp_path: Path) -> None:
    """Said before anything is started: 128 images can be shared by 2 and by 4 workers, not by 3."""
    source = save(timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE), tmp_path / "source")
    job = Finetuning(model=source, data="digits", recipe=Recipe(batch_size=128), out=tmp_path / "out")
    with pytest.raises(UserError, match="batch_size = 128 cannot be shared by 3 workers .* must be a multiple of 3"):
        finetune(job, Placement(4, min_workers=2))
