"""Start a Ray on this machine or join a running cluster, so that no process of Ray is left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import prunesweep
from prunesweep.models import UserError

from ..signals import deferred

for name, value in {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in the folder that the user is in
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(name, value)

import ray  # noqa: E402
from ray._private import ray_constants  # noqa: E402
from ray.job_config import JobConfig  # noqa: E402

__all__ = ["OBJECT_STORE_BYTES", "connected", "join", "own_token", "start"]

SAFE_PATH = "PYTHONSAFEPATH"  # python -c, by which Ray starts some processes, puts the current folder first else
OBJECT_STORE_BYTES = 128 * 2**20  # processes exchange files, not objects


def start(**options: Any) -> Any:
    """Call ``ray.init`` so that no Ctrl-C is lost meanwhile, and none leaves processes of Ray behind.

    Processes of Ray do not look for modules in the current folder: what the user has there may be ``datasets.py``. A
    Ray of our own (``address="local"``) listens to this machine alone.

    Args:
        options: arguments of ``ray.init``.

    Returns:
        Ray's context.
    """
    try:
        own = options.get("address") == "local"
        with deferred(signal.SIGINT), _setting(SAFE_PATH, "1"), _on_loopback() if own else contextlib.nullcontext():
            return ray.init(job_config=_job_config(), **options)
    except KeyboardInterrupt:
        ray.shutdown()
        raise


@contextlib.contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes that are started in the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started in the block has the address 127.0.0.1, and all of its processes listen to that alone.

    ``ray.init`` replaces that address by one that others can reach, unless clusters are switched off, as they are on
    macOS and Windows.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _setting(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0"):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _current_folder() -> Path | None:
    """The current folder; None where it was removed, as Ray does with a job's where nodes share a temporary folder."""
    with contextlib.suppress(FileNotFoundError):
        return Path.cwd().resolve()
    return None


class _SearchPath(list[str]):
    """Folders that Ray puts before all others in its workers' module search path, without the current one."""

    def extend(self, folders: Iterable[str]) -> None:
        here = _current_folder()
        super().extend(folder for folder in folders if Path(folder).resolve() != here)


def _job_config() -> JobConfig:
    """Ray's settings of a job. Where this package itself is imported from the current folder, Ray's own ones."""
    config = JobConfig()
    if Path(prunesweep.__file__).resolve().parents[1] != _current_folder():
        config._py_driver_sys_path = _SearchPath()  # ``ray.init`` extends it by the current folder
    return config


def join(address: str, options: Mapping[str, Any]) -> Any:
    """Connect to a running cluster.

    Args:
        address: the cluster's address.
        options: further arguments of ``ray.init``.

    Returns:
        Ray's context.

    Raises:
        UserError: no cluster answers at ``address``.
    """
    try:
        return start(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster can be reached at {address}: {error}") from error


@contextlib.contextmanager
def connected(address: str | None, *, cpus: float, gpus: float) -> Iterator[None]:
    """Join a cluster, or start a Ray of our own, for the time of a ``with`` block.

    Args:
        address: the cluster's address; None for a Ray of our own, or the one that this process has joined already.
        cpus: CPUs that all workers need together; a Ray of our own offers one more.
        gpus: GPUs that all workers need together.

    Raises:
        UserError: nothing answers at ``address``, or the cluster does not have the CPUs and GPUs.
    """
    if address is None and ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        own_token()
        own = {"num_cpus": int(cpus) + 1, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        start(address="local", **own, **options)
    else:
        join(address, options)
    try:
        total = ray.cluster_resources()
        for name, wanted in (("CPU", cpus), ("GPU", gpus)):
            if wanted > total.get(name, 0):
                raise UserError(f"the workers need {wanted:g} {name}s in all, Ray has {total.get(name, 0):g}")
        yield
    finally:
        ray.shutdown()


def own_token() -> None:
    """Set a token that only this process and its own Ray know; Ray then requires it from every client.

    Not for clusters: a cluster has its own token, or none, and then its drivers must have none either.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
