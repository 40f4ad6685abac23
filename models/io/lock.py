"""A lock that processes of several hosts and containers hold one at a time, on local disks and NFS.

A lock is a folder of leases, files with rising numbers; the highest is who holds it. To take it, a process makes the
file of the next number by a hard link, which fails where there is one: nobody's lease is ever replaced. So two that
find a dead holder's lease at once cannot both have the next number, and a holder that was taken for dead (a process
that was stopped, a node that lost its network) sees a number above its own and must end. Processes that work for it are
given its number, and compare it before they write.

A holder is alive as long as it touches its lease. How long ago that was is told by the file system, which dates both
the lease and a file that the reader writes, so clocks of hosts need not agree. Only where reader and holder share a
kernel and see the same process numbers is a dead process known at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from prunesweep.models.errors import UserError

from .files import sweep

__all__ = ["BEAT", "STALE", "Fence", "Holder", "Lock", "Lost", "Vanished", "died", "own_place", "reserve", "started_at"]

BEAT, STALE = 10.0, 60.0  # seconds between two signs of life, and without any
RELEASED = 0.0  # time of a lease that was given back
LOOKS = (0.05, 0.2, 0.5)  # seconds until a lease above one's own is looked at again
TRIES = 100  # to take a lock that others try to take at the same moment
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without hard links


class Lost(UserError):
    """Another process has taken over what this one was working on."""


class Vanished(Lost):
    """What this process was working on is gone, with its lock: deleted, or on storage that went away."""


class Holder(NamedTuple):
    """Who holds a lock, and how many seconds ago it last gave a sign of life."""

    host: str
    pid: int
    age: float


class Fence(NamedTuple):
    """A lease, to ask before a write whether it still is the highest; it can be sent to other processes and hosts."""

    place: Path
    number: int

    def check(self) -> None:
        """Raises Lost where another process has taken over, and Vanished where there is nothing to take over."""
        for pause in (*LOOKS, None):
            found = _leases(self.place)
            if self.number in found and max(found) == self.number:
                return
            if pause is not None:  # a process that came too late takes its lease away again at once
                time.sleep(pause)
        if not found:
            gone = self.place if self.place.parent.is_dir() else self.place.parent
            raise Vanished(
                f"{gone} is gone: it was deleted, or its storage went away; bring it back. Nothing is written before"
            )
        raise Lost(
            f"{self.place.parent}: another process has taken over, because this one gave no sign of life for "
            f"{STALE:.0f} seconds; nothing more is written"
        )


class Lock:
    """The right to write to something, for the time of a ``with`` block.

    Args:
        place: the folder of leases, which is made where it is not there.
        what: that is locked, for messages.
        keep: leave the folder, so that numbers go on rising; otherwise it goes with the last lease.
        on_lost: called, in a thread, where another process has taken over. ``check`` says it, too.

    Raises:
        UserError: a live process holds it.
    """

    def __init__(
        self, place: Path, what: str, *, keep: bool = False, on_lost: Callable[[Lost], object] | None = None
    ) -> None:
        self.place, self.what, self.keep, self.on_lost = place, what, keep, on_lost
        self.identity, self.number, self._stop = uuid.uuid4().hex, 0, threading.Event()
        self._touching = threading.Lock()

    @property
    def fence(self) -> Fence:
        """For processes that work for this one."""
        return Fence(self.place, self.number)

    @staticmethod
    def holder(place: Path) -> Holder | None:
        """The live process that holds the lock of a place, or None; where it cannot be told, as on a read-only file
        system, the last one counts as alive.
        """
        leases = _leases(place)
        if not leases:
            return None
        scratch = place / f".{uuid.uuid4().hex}"
        try:
            scratch.write_text(json.dumps(own_place()))
            now: float | None = scratch.stat().st_mtime
        except OSError:
            now = None
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()
        return _held(place, max(leases), now)

    def __enter__(self) -> Lock:
        scratch = self.place / f".{self.identity}"
        for attempt in range(TRIES):
            try:
                self.place.mkdir(parents=True, exist_ok=True)
                scratch.write_text(json.dumps({"identity": self.identity, **own_place()}))
                now = scratch.stat().st_mtime
                seen = _leases(self.place)
                for number in sorted(seen, reverse=True):
                    if held := _held(self.place, number, now):
                        raise UserError(self._in_use(held))
                self.number = max(seen, default=0) + 1
                _link(scratch, _file(self.place, self.number))
            except FileNotFoundError:  # its last holder has just removed the folder
                if not self.place.parent.is_dir():  # or none can be made there, as below /proc
                    raise
                continue
            except FileExistsError:  # another process was quicker
                continue
            finally:
                with contextlib.suppress(OSError):
                    scratch.unlink()
            # Where the folder was emptied in between, another process may have begun again at a lower number, which
            # can be that of a lease seen here; so what is there is asked again. Of two that meet here both give way.
            others = _leases(self.place) - {self.number}
            if max(others, default=0) < self.number and not any(_held(self.place, one, now) for one in others):
                break
            self._remove()
            time.sleep(random.random() * 0.01 * (attempt + 1))
        else:
            raise UserError(f"{self.what}: too many processes try to take it at once")
        for number in others:
            _file(self.place, number).unlink(missing_ok=True)
        _sweep(self.place, now)
        threading.Thread(target=self._beat, daemon=True, name=f"lock of {self.place.name}").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """Raises Lost where another process has taken over, and Vanished where all of it is gone."""
        self.fence.check()

    def release(self) -> None:
        """Let others in; what another process has taken over is left to it."""
        with self._touching, contextlib.suppress(OSError, ValueError):
            self._stop.set()
            lease = _file(self.place, self.number)
            if json.loads(lease.read_text())["identity"] != self.identity:
                return
            if self.keep:
                os.utime(lease, (RELEASED, RELEASED))  # which a full disk does not refuse
            else:
                self._remove()
                self.place.rmdir()  # unless another process is about to take the lock

    def _remove(self) -> None:
        _file(self.place, self.number).unlink(missing_ok=True)

    def _in_use(self, held: Holder) -> str:
        free = f", or wait {max(STALE - held.age, 1):.0f} s if that is gone" if held.age > 2 * BEAT else ""
        return (
            f"{self.what} is in use by process {held.pid} on {held.host}; wait for it or stop it (Ctrl-C there, or "
            f"kill that process){free}"
        )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self.check()
                with self._touching:
                    if not self._stop.is_set():
                        os.utime(_file(self.place, self.number))
            except Vanished:  # storage may come back, and who works on it meets its absence by itself
                continue
            except Lost as lost:
                if self.on_lost and not self._stop.is_set():
                    self.on_lost(lost)
                return
            except OSError:  # a file system that does not answer now may do so later
                continue


@contextlib.contextmanager
def reserve(path: Path, option: str = "--out") -> Iterator[Path]:
    """Hold a place where something is to be made, so that no second command makes it as well.

    What an earlier command that was killed has left beside it (``files.publish_folder``) is removed.

    Args:
        path: the file or folder, which must not be there.
        option: its name on the command line.

    Yields:
        The absolute path.

    Raises:
        UserError: it is there, or another process is making it.
    """
    shown, path = path, path.absolute()
    missing = [parent for parent in path.parents if not parent.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            stack.enter_context(Lock(path.with_name(f".{path.name}.lock"), f"{option} {shown}"))
        except OSError as error:
            raise UserError(f"{option} {shown}: nothing can be written there: {error.strerror}") from error
        if path.exists():
            raise UserError(f"{option} {shown}: is there already; give a new one")
        sweep(path, held=True)
        yield path


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, unless there is something in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _file(place: Path, number: int) -> Path:
    return place / f"{number:09d}"


def _leases(place: Path) -> set[int]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return {int(name) for name in os.listdir(place) if name.isdigit()}
    return set()


def _sweep(place: Path, now: float) -> None:
    """Remove scratch files of processes that were killed while they asked for the lock; else the folder stays."""
    for path in place.glob(".*"):
        with contextlib.suppress(OSError):
            try:
                dead = died(json.loads(path.read_text()))
            except (ValueError, TypeError, KeyError, AttributeError):  # being written
                dead = False
            if dead or now - path.stat().st_mtime > STALE:
                path.unlink()


def _link(scratch: Path, lease: Path) -> None:
    """Make the lease, or raise FileExistsError where there is one."""
    try:
        os.link(scratch, lease)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with lease.open("x") as file:  # seen empty for a moment, which counts as held
            file.write(scratch.read_text())


def _held(place: Path, number: int, now: float | None) -> Holder | None:
    """Who holds a lease, or None where its holder has released it, is dead, or gives no sign of life."""
    try:
        with _file(place, number).open("rb") as file:  # NFS asks its server for the times of a file that is opened
            touched, text = os.fstat(file.fileno()).st_mtime, file.read()
    except FileNotFoundError:
        return None  # removed since it was listed
    except OSError:  # of another user, who lets nobody read it
        touched, text = _file(place, number).stat().st_mtime, b""
    age = 0.0 if now is None else now - touched
    try:
        found = json.loads(text)
        if died(found):
            return None
        held = Holder(str(found["host"]), int(found["pid"]), age)
    except (ValueError, TypeError, KeyError, AttributeError):  # being written, or damaged
        held = Holder("an unknown host", 0, age)
    return held if age < STALE else None


def own_place() -> dict[str, Any]:
    """Where this process runs, and since when."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": started_at(pid), **_kernel()}


def _kernel() -> dict[str, str]:
    """What tells whether two processes see the same process numbers; empty where the system does not say."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "processes": os.readlink("/proc/self/ns/pid")}
    return {}


def died(found: dict[str, Any]) -> bool:
    """Whether a holder is known to be dead; a heartbeat must tell where its process cannot be seen from here."""
    kernel = _kernel()
    if not kernel or any(found.get(name) != value for name, value in kernel.items()):
        return False
    pid = int(found["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return started_at(pid) != found["started"]  # else the number is another process's by now


def started_at(pid: int) -> str:
    """Return when a process began, which no other one of its number did; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
