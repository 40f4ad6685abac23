"""Start a Ray on this machine or join a running cluster, so that no process of Ray is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

import prunesweep
from prunesweep.models import UserError
from prunesweep.models.io.scratch import remove_left, remove_scratch_folders, scratch_folder

from ..container import check_shared_memory, usable_memory
from ..signals import deferred
from . import ray_processes
from .ray_processes import MAIN, children, name_of, named, over, started_at

for name, value in {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in the folder that the user is in
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(name, value)

import ray  # noqa: E402
from ray._private import ray_constants  # noqa: E402
from ray._private import worker as ray_worker  # noqa: E402
from ray._raylet import (  # type: ignore[attr-defined]  # noqa: E402  # its stub lacks them
    AuthenticationMode,
    AuthenticationTokenLoader,
    get_authentication_mode,
)
from ray.job_config import JobConfig  # noqa: E402
from ray.util.placement_group import (  # noqa: E402
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

__all__ = [
    "RAY_DIED",
    "RayDied",
    "alive",
    "check_starts",
    "connected",
    "free_places",
    "joined",
    "object_store_bytes",
    "own_ray",
    "owned",
]

RAY_DIED = 3  # exit code
LONGEST_PLACE = 34  # bytes: a socket's path has 107 at most, and Ray's names of session and socket take 73 of them

PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # for sockets, where temporary files lie too deep
FILES, FILES_EACH = 100, 12  # that one process of Ray has open, by itself and for every process that works
GONE = 5.0  # seconds for killed processes to be gone

SAFE_PATH = "PYTHONSAFEPATH"  # python -c, by which Ray starts some processes, puts the current folder first else
STORE = (80 * 2**20, 128 * 2**20)  # bytes for objects, which Ray wants 75 MiB for; processes exchange files


def start(**options: Any) -> Any:
    """Call ``ray.init`` so that no Ctrl-C is lost meanwhile.

    Processes of Ray do not look for modules in the current folder: what the user has there may be ``datasets.py``. A
    Ray of our own (``address="local"``) listens to this machine alone.

    Args:
        options: arguments of ``ray.init``.

    Returns:
        Ray's context.
    """
    own = options.get("address") == "local"
    with deferred(signal.SIGINT), _setting(SAFE_PATH, "1"), _on_loopback() if own else contextlib.nullcontext():
        return ray.init(job_config=_job_config(), **options)


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


class RayDied(Exception):
    """The Ray that this process has started or joined is dead, or could not be started."""


@contextlib.contextmanager
def own_ray(on_death: Callable[[], object], **options: Any) -> Iterator[Any]:
    """Run a Ray of our own on this machine for the time of a ``with`` block; nothing of it stays afterwards.

    Args:
        on_death: called, in a thread or from the end of the block, within a second of the death of Ray's node manager
            (raylet) or its central store (GCS). Ray's processes and its folder are gone by then. It should end this
            process: what waits for Ray waits for minutes.
        options: arguments of ``ray.init``.

    Yields:
        Ray's context.

    Raises:
        RayDied: Ray does not start.
    """
    if given := os.environ.get("RAY_ADDRESS"):
        warnings.warn(
            f"RAY_ADDRESS = {given} is not used: a Ray of our own starts on this machine. To take that cluster, whose "
            "nodes must all see the folder of results, give --address auto",
            stacklevel=2,
        )
    own_token()
    with _ray_folder() as folder, _with_token(), contextlib.ExitStack() as stack:
        helper = stack.enter_context(_helped(folder))

        def end() -> None:
            helper()
            _end_processes(folder)
            remove_scratch_folders()
            on_death()

        try:
            with _looked_after(_Starting().alive, end, period=0.1, misses=1):
                context = start(address="local", _temp_dir=folder, **options)
        except BaseException as error:
            helper()
            ray.shutdown()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise RayDied(f"Ray died while it started: {reason or type(error).__name__}") from error

        try:
            with _watched(_own_alive, end, period=0.2, misses=1):
                try:
                    yield context
                finally:
                    helper()
                    _own_alive()
        finally:
            _end_begun()
            remove_left()


@contextlib.contextmanager
def joined(address: str, on_death: Callable[[], object], **options: Any) -> Iterator[Any]:
    """Join a running cluster for the time of a ``with`` block.

    Args:
        address: the cluster's address.
        on_death: as for ``own_ray``, within a few seconds of the death of the cluster's head.
        options: further arguments of ``ray.init``.

    Yields:
        Ray's context.

    Raises:
        UserError: no cluster answers at ``address``.
    """
    try:
        context = start(address=address, **options)
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster can be reached at {address}: {error}") from error
    host, _, port = context.address_info["gcs_address"].rpartition(":")

    def end() -> None:
        remove_scratch_folders()
        on_death()

    with _watched(lambda: _open(host, int(port)), end, period=1.0, misses=2):
        yield context


@contextlib.contextmanager
def _watched(
    lives: Callable[[], bool], on_death: Callable[[], object], *, period: float, misses: int
) -> Iterator[None]:
    """Look after a Ray for the time of a ``with`` block, and shut it down at the end."""
    global _lives
    _lives = lives
    try:
        with _looked_after(lives, on_death, period=period, misses=misses):
            yield
    finally:
        _lives = None
        ray.shutdown()


@contextlib.contextmanager
def _looked_after(
    lives: Callable[[], bool], on_death: Callable[[], object], *, period: float, misses: int
) -> Iterator[None]:
    """Look after a Ray for the time of a ``with`` block.

    Ray itself notices only after a minute, and then exits with code 0. What waits for a reply raises all kinds of
    errors, sooner or later than the thread here sees why.
    """
    stop = threading.Event()
    dead = threading.Lock()  # of two that notice, the second one waits for the end of this process

    def watch() -> None:
        missed = 0
        while missed < misses:
            if stop.wait(period):
                return
            missed = 0 if lives() else missed + 1
        with dead:
            if not stop.is_set():
                on_death()

    threading.Thread(target=watch, daemon=True, name="watches over Ray").start()
    try:
        yield
    except Exception:
        if not lives():
            with dead:
                stop.set()
                on_death()
        raise
    finally:
        stop.set()


_lives: Callable[[], bool] | None = None  # tells whether the Ray of this process lives


def alive() -> bool:
    """Whether the Ray that this process has started or joined lives, as far as it knows."""
    return _lives is None or _lives()


def owned() -> bool:
    """Whether the Ray of this process is one of our own."""
    return _lives is _own_alive


def free_places() -> None:
    """Give back what is reserved for workers of a Ray of our own, which serves this process alone.

    Ray Train leaves that to a process of its own where the one that directs the workers is lost, and that process asks
    the dashboard, which such a Ray does not have.
    """
    if not owned():
        return
    for name, found in placement_group_table().items():
        if found["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _node() -> Any:
    """The processes of a Ray of our own, as Ray knows them."""
    return ray_worker._global_node


def _own_alive() -> bool:
    """Whether those two processes of a Ray of our own live without which it is dead; notes what the first has begun."""
    global _begun
    node = _node()
    if node is None:
        return True
    dead = {kind for kind, _ in node.dead_processes()}
    if dead & {ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER}:
        return False
    for found in node.all_processes.get(ray_constants.PROCESS_TYPE_RAYLET, ()):
        _begun = children(found.process.pid) or _begun
    return True


class _Starting:
    """The processes of a Ray that ``ray.init`` is starting, before Ray tells which they are."""

    def __init__(self) -> None:
        self._others = set(children(os.getpid()))
        self._seen: dict[int, str] = {}

    def alive(self) -> bool:
        """Whether its node manager and its central store live, as far as they have begun."""
        for pid, started in children(os.getpid()).items():
            if pid not in self._others and name_of(pid) in MAIN:
                self._seen[pid] = started
        return not any(over(pid) or started_at(pid) != started for pid, started in self._seen.items())


DIED = (
    "error: Ray died; the same command goes on from what is saved (prunesweep resume RUN, of a search that has begun)"
)


@contextlib.contextmanager
def _helped(folder: str) -> Iterator[Callable[[], None]]:
    """Let another process look after a Ray that starts in a folder, for where Ray lets no thread of this one run.

    Yields:
        A function that ends it.
    """
    if sys.platform != "linux":  # nothing there tells of processes
        yield lambda: None
        return
    command = [sys.executable, "-I", "-S", ray_processes.__file__, str(os.getpid()), folder, DIED]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Ctrl-C is for this process
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end() -> None:
        process.kill()
        process.wait()

    try:
        with _quitting():
            yield end
    finally:
        end()


@contextlib.contextmanager
def _quitting() -> Iterator[None]:
    """End this process with ``RAY_DIED`` by SIGQUIT, whatever it is doing: the C library's ``_exit`` handles it.

    That gets the signal's number, 3, as its argument.
    """
    assert RAY_DIED == signal.SIGQUIT
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = library.signal(signal.SIGQUIT, ctypes.cast(library._exit, ctypes.c_void_p))
    try:
        yield
    finally:
        library.signal(signal.SIGQUIT, before)


_begun: dict[int, str] = {}  # processes that the raylet has begun, with the times when they began


def _end_processes(folder: str) -> None:
    """Kill a Ray of our own. Workers and agents that a dead raylet has left would live on for half a minute.

    Args:
        folder: the Ray's own.
    """
    global _begun
    _begun = {**_begun, **named(folder)}
    with contextlib.suppress(Exception):  # the other thread may be ending them, too
        _node().kill_all_processes(check_alive=False, allow_graceful=False, wait=False)
    _end_begun()


def _end_begun() -> None:
    """Kill what the raylet had begun and is there still, and wait until it is gone: then what it held can go."""
    deadline = time.monotonic() + GONE
    while left := [pid for pid, started in _begun.items() if started and started_at(pid) == started and not over(pid)]:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except TimeoutError:
        return True  # busy, not dead
    except OSError:
        return False
    return True


def check_starts(processes: int) -> None:
    """Check that a Ray of our own can start in this process, before anything is worked on that it is needed for.

    Args:
        processes: those that are to work side by side.

    Raises:
        UserError: too few files may be open, or there is no place for Ray's sockets.
    """
    check_shared_memory()
    if ray.is_initialized():
        return
    _ray_place()
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # Ray raises the other limit to this one
    least = FILES + FILES_EACH * processes
    if most != resource.RLIM_INFINITY and most < least:
        raise UserError(
            f"this process may have {most} files open at a time, and Ray needs {least} for {processes} "
            f"{'process' if processes == 1 else 'processes'} side by side: raise the limit (ulimit -Hn {2 * least}, or "
            "the service's or container's nofile), or let fewer work side by side"
        )


def _ray_place() -> Path:
    """Where a Ray of our own may keep its sockets and logs: with temporary files, or where the paths are short enough.

    Raises:
        UserError: there is no such place.
    """
    own = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    for place in (own, *map(Path, PLACES)):
        if len(os.fsencode(place.absolute())) <= LONGEST_PLACE and os.access(place, os.W_OK | os.X_OK):
            return place
    raise UserError(
        f"{own}: Ray's sockets need a folder that may be written to, with a path of at most {LONGEST_PLACE} bytes, and "
        f"{', '.join(PLACES)} are none either; name one with RAY_TMPDIR"
    )


@contextlib.contextmanager
def _ray_folder() -> Iterator[str]:
    """A scratch folder for Ray's sockets and logs; by default they stay in /tmp/ray for good."""
    with scratch_folder(_ray_place()) as folder:
        yield str(folder)


def _print_for_people(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Print what Ray has to tell, but for the end of a dead raylet's log: that Ray died is said in one line."""
    lines = [line for line in data["lines"] if not line.startswith("Raylet is terminated.")]
    if lines:
        _print({**data, "lines": lines}, ignore_prefix)


_print, ray_worker.print_to_stdstream = ray_worker.print_to_stdstream, _print_for_people


@contextlib.contextmanager
def connected(address: str | None, *, cpus: float, gpus: float) -> Iterator[None]:
    """Join a cluster, or start a Ray of our own, for the time of a ``with`` block.

    Should Ray die meanwhile, this process says so and ends with ``RAY_DIED``.

    Args:
        address: the cluster's address; None for a Ray of our own, or the one that this process has joined already.
        cpus: CPUs that all workers need together; a Ray of our own offers one more.
        gpus: GPUs that all workers need together.

    Raises:
        UserError: nothing answers at ``address``, or the cluster does not have the CPUs and GPUs.
        RayDied: a Ray of our own does not start.
    """
    if address is None and ray.is_initialized():
        yield
        return
    if address is None:
        check_starts(math.ceil(cpus))
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        own = {"num_cpus": int(cpus) + 1, "include_dashboard": False, "object_store_memory": object_store_bytes()}
        session = own_ray(_leave, **own, **options)
    else:
        session = joined(address, _leave, **options)
    with session:
        total = ray.cluster_resources()
        for name, wanted in (("CPU", cpus), ("GPU", gpus)):
            if wanted > total.get(name, 0):
                raise UserError(f"the workers need {wanted:g} {name}s in all, Ray has {total.get(name, 0):g}")
        yield


def _leave() -> NoReturn:
    """Say that Ray died, and end this process from whatever thread, at once."""
    console = Console(stderr=True)
    if console.is_terminal:  # a progress bar may be there
        console.show_cursor()
        console.print()
    console.print("error: Ray died; the same command goes on from what is saved", style="red", highlight=False)
    os._exit(RAY_DIED)


def object_store_bytes() -> int:
    """Return how much memory a Ray of our own may take for objects: little, and less where little is left to us."""
    least, most = STORE
    return max(least, min(most, usable_memory() // 32))


@contextlib.contextmanager
def _with_token() -> Iterator[None]:
    """A Ray that is started in the block asks for the token, whatever Ray this process had before.

    Ray keeps the token of the first one, until it is told to look again. For good it keeps that there was none, where
    this process has joined a cluster without one; then there is none here either, and this machine's users can reach
    that Ray.
    """
    with _setting("RAY_AUTH_MODE", "token"):
        if get_authentication_mode() == AuthenticationMode.TOKEN:
            AuthenticationTokenLoader.instance().reset_cache()
            yield
            return
    with _setting("RAY_AUTH_MODE", "disabled"):
        yield


def own_token() -> None:
    """Set a token that only this process and its own Ray know; Ray then requires it from every client.

    Not for clusters: a cluster has its own token, or none, and then its drivers must have none either.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
