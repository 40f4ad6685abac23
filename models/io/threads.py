"""Work in a thread beside other work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["beside"]


@contextlib.contextmanager
def beside(work: Callable[[threading.Event], object], name: str | None = None) -> Iterator[None]:
    """Run ``work`` in a thread during a ``with`` block, whose end waits for it.

    Args:
        work: gets an event that is set at the end of the block, upon which it is to return.
        name: of the thread.
    """
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
