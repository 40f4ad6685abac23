"""Record the metrics of a training in ``metrics.jsonl`` and for TensorBoard, and measure its speed."""

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

QUALITIES = ("val_loss", "top1", "top5", "balanced", "ppl", "agreement", "kl", "cosine", "relative_error")
SCALARS = ("loss", *QUALITIES, "lr", "images_per_s")


class MetricsLog:
    """Append to a file of JSON lines and to TensorBoard's event files; a context manager that closes them.

    No file is created before the first line. Each line is written at once, so that a killed process loses none.

    Args:
        lines: the file of JSON lines, ``metrics.jsonl``.
        board: folder of TensorBoard's files.
        events: add to every line its time and the name of what happened (``event``). Without it, lines are epochs.
        before: epochs of the same model in earlier logs, which TensorBoard counts on from.
    """

    def __init__(self, lines: Path, board: Path, *, events: bool = False, before: int = 0) -> None:
        self._lines, self._board, self._events, self._before = lines, board, events, before
        self._writer: SummaryWriter | None = None

    @classmethod
    def beside(cls, work: Path) -> MetricsLog:
        """Return the log of a job whose folder is ``work``, with a line per epoch."""
        return cls(work / "metrics.jsonl", work / "tb")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def event(self, name: str, **values: Any) -> None:
        """Write a line about an event.

        Args:
            name: the event's name.
            values: its JSON-ready values.
        """
        known = {"time": time.time(), "event": name} if self._events else {}
        self._lines.parent.mkdir(exist_ok=True)  # and no parents: those of storage that is gone
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**known, **values}) + "\n")

    def epoch(self, epoch: Epoch) -> None:
        """Write the figures of an epoch as a line, and its numbers as TensorBoard's scalars."""
        self.event("epoch", **asdict(epoch))
        if self._writer is None:
            self._writer = SummaryWriter(str(self._board))
        scalars = {name: value for name in SCALARS if (value := getattr(epoch, name)) is not None}
        scalars |= {f"facts/{name}": value for name, value in epoch.facts.items() if not isinstance(value, str)}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, self._before + epoch.epoch)


class StepRate:
    """Measure the speed of training over its latest updates, without the time between epochs.

    Args:
        batch_size: images per update.
        window: seconds of updates that count.
    """

    def __init__(self, batch_size: int, window: float = 30.0) -> None:
        self.batch_size, self.window = batch_size, window
        self._seen: deque[tuple[float, int]] = deque()

    def step(self, done: int) -> tuple[float, float] | None:
        """Record that ``done`` updates are done.

        Returns:
            Images per second and updates per second; None before the second call of an epoch.
        """
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
        """Forget the updates so far, at the end of an epoch."""
        self._seen.clear()
