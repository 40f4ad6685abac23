"""Metrics of a training: ``metrics.jsonl``, TensorBoard, and the speed that is shown meanwhile."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter

from ..loop import Epoch

__all__ = ["MetricsLog", "StepRate"]

SCALARS = ("loss", "top1", "top5", "lr", "images_per_s")


class MetricsLog:
    """Appends to a file of JSON lines and to TensorBoard's events; a context manager, which closes them.

    Nothing is created before the first line. A line is written at once, so that a killed process loses none.

    Args:
        lines: the file, ``metrics.jsonl``.
        board: folder of TensorBoard's files.
        events: a line also has its time and the name of what happened (``event``); by default every line is an epoch.
    """

    def __init__(self, lines: Path, board: Path, *, events: bool = False) -> None:
        self._lines, self._board, self._events = lines, board, events
        self._writer: SummaryWriter | None = None

    @classmethod
    def beside(cls, work: Path) -> MetricsLog:
        """Return the log of a job whose folder is ``work``: a line per epoch."""
        return cls(work / "metrics.jsonl", work / "tb")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def event(self, name: str, **values: Any) -> None:
        """Write a line: what happened, with JSON-ready values."""
        known = {"time": time.time(), "event": name} if self._events else {}
        self._lines.parent.mkdir(parents=True, exist_ok=True)
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**known, **values}) + "\n")

    def epoch(self, epoch: Epoch) -> None:
        """Write an epoch, its numbers also as TensorBoard's scalars."""
        self.event("epoch", **asdict(epoch))
        if self._writer is None:
            self._writer = SummaryWriter(str(self._board))
        scalars = {name: getattr(epoch, name) for name in SCALARS}
        scalars |= {} if epoch.ppl is None else {"ppl": epoch.ppl}
        scalars |= {f"facts/{name}": value for name, value in epoch.facts.items() if not isinstance(value, str)}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch.epoch)


class StepRate:
    """How fast training goes: updates of the last ``window`` seconds, without what lies between epochs."""

    def __init__(self, batch_size: int, window: float = 30.0) -> None:
        self.batch_size, self.window = batch_size, window
        self._seen: deque[tuple[float, int]] = deque()

    def step(self, done: int) -> tuple[float, float] | None:
        """Return images and updates per second; None until two calls have come since the last epoch's end."""
        now = time.monotonic()
        self._seen.append((now, done))
        while now - self._seen[0][0] > self.window and len(self._seen) > 2:
            self._seen.popleft()
        (before, first), (_, last) = self._seen[0], self._seen[-1]
        if last <= first or now <= before:
            return None
        rate = (last - first) / (now - before)
        return rate * self.batch_size, rate

    def pause(self) -> None:
        """Forget the updates so far: an epoch has ended, and what follows is not training."""
        self._seen.clear()
