"""Handlers of signals for a while."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["deferred", "handling"]


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], Any], *numbers: signal.Signals) -> Iterator[None]:
    """``handler`` for these signals in the block; nothing outside the main thread, whose signals they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextlib.contextmanager
def deferred(number: signal.Signals) -> Iterator[None]:
    """A signal that comes in the block is delivered at its end, the second one at once.

    For code that starts processes: an exception out of a handler is lost where it meets a hook of ``os.fork``.
    """
    before, came = signal.getsignal(number), False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        if came and callable(before):
            before(number, frame)
        came = True

    try:
        with handling(note, number):
            yield
    finally:
        if came:
            signal.raise_signal(number)
