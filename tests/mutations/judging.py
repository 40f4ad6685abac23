"""Try many changed inputs and count what becomes of them.

An input is refused with a ``UserError`` or gives a right result; anything else is a fault: another exception, more than
``SECONDS`` of work, more memory than ``ROOM`` and a multiple of the file's own size, a file that is left behind.

``PRUNESWEEP_MUTATIONS=3000`` tries so many of each kind; ``PRUNESWEEP_MUTATIONS_LIST=FILE`` writes what became of each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from prunesweep.models import UserError

__all__ = ["Tally", "files_below", "rounds"]

SECONDS, WAITING = 10.0, 100.0  # of this process, and by the clock: other processes may be in the way
ROOM, FACTOR, LEAST = 256 * 2**20, 40, 12


class TooSlow(BaseException):
    """No answer in ``SECONDS``. Not an ``Exception``: what catches those must not take it for its own."""


def rounds(most: float) -> Iterator[int]:
    """Yield the numbers of tries: for ``most`` seconds, ``LEAST`` at least, or those that are asked for."""
    asked, begun, number = os.environ.get("PRUNESWEEP_MUTATIONS"), time.monotonic(), 0
    while number < (int(asked) if asked else LEAST) or (not asked and time.monotonic() - begun < most):
        yield number
        number += 1


def files_below(folder: Path) -> dict[str, int]:
    """Return the size of every file and link below a folder by name, and -1 for folders."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found[str(path.relative_to(folder))] = -1 if path.is_dir() else path.lstat().st_size
    return found


@dataclass
class Tally:
    """Counts of what was tried, and a line for every fault."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def attempt(
        self, what: str, work: Callable[[], Any], *, size: int = 0, allowed: type | tuple[type, ...] = ()
    ) -> Any:
        """Do something with a changed input.

        Args:
            what: how the input was changed, for the line of a fault.
            work: what is done with it.
            size: bytes of the input.

        Returns:
            What the work returned, None where it was refused.
        """
        before, begun, found = _resident(), time.process_time(), None
        try:
            with _limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = work()
            self._count("accepted", what)
        except UserError as error:
            self._count("refused", what, str(error))
            if not str(error).strip():
                self._fault(what, "an empty message")
        except (Exception, TooSlow) as error:
            self._count("bare", what)
            every = traceback.extract_tb(error.__traceback__)
            ours = [f for f in every if not any(part in f.filename for part in ("/tests/", "/lib/python"))]
            at = (ours or every)[-1]
            self._fault(what, f"{type(error).__name__}: {str(error)[:200]} ({Path(at.filename).name}:{at.lineno})")
        seconds, grown = time.process_time() - begun, _peak() - before
        if seconds > SECONDS:
            self._fault(what, f"{seconds:.1f} s")
        if grown > ROOM + FACTOR * size:
            self._fault(what, f"{grown / 2**20:.0f} MiB for {size:,} bytes")
        return found

    def check(self, what: str, *, good: bool, reason: str) -> None:
        """Note a fault of a result that is not right."""
        if not good:
            self._fault(what, reason)

    def _count(self, outcome: str, what: str, reason: str = "") -> None:
        self.counts[outcome] += 1
        if listed := os.environ.get("PRUNESWEEP_MUTATIONS_LIST"):
            with Path(listed).open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{outcome} {what[:300]!r} {reason[:300]!r}\n")

    def _fault(self, what: str, reason: str) -> None:
        self.counts["faults"] += 1
        self.wrong.append(f"{what[:300]}: {reason}")

    def settle(self) -> None:
        """Say the counts, and fail where there is a fault, or where nothing or all was refused."""
        print(dict(self.counts))
        assert not self.wrong, f"{dict(self.counts)}\n" + "\n".join(self.wrong)
        assert self.counts["refused"]


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"no answer in {SECONDS:g} s of this process, or in {WAITING:g} s")

    limits = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITING))
    before = [signal.signal(number, stop) for number, _, _ in limits]
    for _, timer, seconds in limits:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(limits, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _resident() -> int:
    """Bytes of this process in memory; the peak is counted anew from here."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0
