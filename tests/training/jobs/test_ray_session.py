"""Starting Ray, whoever starts it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prunesweep.search.config import ResourcesTable
from prunesweep.search.execution.runtime import RayConnection
from prunesweep.training.jobs import ray_session
from prunesweep.training.jobs.ray_session import connected


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT raises: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def for_units() -> RayConnection:
    return RayConnection(ResourcesTable(cpus=1), address=None, verbose=False, on_death=lambda: None)


@pytest.mark.parametrize("begin", [lambda: connected(None, cpus=1, gpus=0), for_units], ids=["workers", "units"])
def test_ctrl_c_while_ray_starts_is_not_lost(begin: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts processes, and Python forgets an exception that meets a hook of ``os.fork``: a logger's, mostly."""

    started: list[bool] = []

    def init(**_: Any) -> None:
        armed = [True]

        def hook() -> None:
            if armed:
                armed.clear()
                signal.raise_signal(signal.SIGINT)

        os.register_at_fork(after_in_parent=hook)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        started.append(True)
        raise ConnectionError("there is no Ray in this test")

    monkeypatch.setattr(ray_session.ray, "init", init)
    with pytest.raises(KeyboardInterrupt), begin():
        pass
    assert started


@pytest.mark.slow
def test_a_ray_of_our_own_listens_to_this_machine_alone() -> None:
    import psutil  # Ray brings it along
    import ray

    with for_units():
        ray.get(ray.remote(lambda: None).remote())  # a worker has begun
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        found = [(p.name(), c.laddr.ip) for p in processes for c in p.net_connections("tcp") if c.status == "LISTEN"]
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert {address.removeprefix("::ffff:") for _, address in found} == {"127.0.0.1"}
