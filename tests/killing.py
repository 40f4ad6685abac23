"""Processes that are killed while they are in the middle of something."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

__all__ = ["inside", "killed_inside"]


@contextlib.contextmanager
def inside(block: AbstractContextManager[Any]) -> Iterator[int]:
    """A process that stays in a ``with`` block until it is killed at the end of this one; yields its number."""
    entered, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with block as found:
                if isinstance(found, Path) and not found.exists():
                    found.write_text("half")
                os.write(tell, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(entered, 1) == b"x"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(entered)


def killed_inside(block: AbstractContextManager[Any]) -> int:
    """Let a process begin a ``with`` block and kill it in there; return its number."""
    with inside(block) as pid:
        return pid
