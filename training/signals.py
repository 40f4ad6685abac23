"""Handle signals, or put them off, for the time of a ``with`` block."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["deferred", "handling"]


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], Any], *numbers: signal.Signals) -> Iterator[None]:
    """Install a handler for some signals for the time of a ``with`` block.

    Does nothing outside the main thread, which is the only one that receives signals.

    Args:
        handler: called with the signal's number and the frame, as for ``signal.signal``.
        numbers: the signals.
    """
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
    """Deliver a signal that comes in a ``with`` block at the block's end; a second one at once.

    For code that starts processes: an exception from a handler is lost if it meets a hook of ``os.fork``.

    Args:
        number: the signal.
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
