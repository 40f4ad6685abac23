"""Signals for the time of a block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from prunesweep.search.config import ResourcesTable
from prunesweep.search.execution import runtime
from prunesweep.search.execution.runtime import RayConnection
from prunesweep.search.execution.signals import deferred, handling

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT raises: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(INT, signal.default_int_handler)
    yield
    signal.signal(INT, before)


def test_a_handler_is_there_for_the_block_only() -> None:
    heard: list[int] = []
    with handling(lambda number, _: heard.append(number), INT, TERM):
        signal.raise_signal(INT)
        signal.raise_signal(TERM)
    assert heard == [INT, TERM]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(INT)


def test_outside_the_main_thread_nothing_is_handled() -> None:
    before = signal.getsignal(INT)
    inside: list[Any] = []

    def work() -> None:
        with handling(lambda number, _: None, INT), deferred(INT):
            inside.append(signal.getsignal(INT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_a_deferred_signal_comes_at_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred(INT):
        signal.raise_signal(INT)
        done.append("the block")
    assert done == ["the block"]


def test_the_second_one_comes_at_once() -> None:
    heard: list[str] = []
    with handling(lambda number, _: heard.append("signal"), INT):
        with deferred(INT):
            signal.raise_signal(INT)
            heard.append("one")
            signal.raise_signal(INT)
            heard.append("two")
        heard.append("end")
    assert heard == ["one", "signal", "two", "signal", "end"]


def test_a_signal_that_is_ignored_stays_so() -> None:
    code = (
        "import signal; from prunesweep.search.execution.signals import deferred\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with deferred(signal.SIGINT):\n    for _ in range(3): signal.raise_signal(signal.SIGINT)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_while_ray_starts_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts processes, and Python forgets an exception that meets a hook of ``os.fork``: a logger's, mostly."""

    started: list[bool] = []

    def init(**_: Any) -> None:
        armed = [True]

        def hook() -> None:
            if armed:
                armed.clear()
                signal.raise_signal(INT)

        os.register_at_fork(after_in_parent=hook)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        started.append(True)
        raise ConnectionError("there is no Ray in this test")

    monkeypatch.setattr(runtime.ray, "init", init)
    connection = RayConnection(ResourcesTable(cpus=1), address=None, verbose=False, on_death=lambda: None)
    with pytest.raises(KeyboardInterrupt), connection:
        pass
    assert started
