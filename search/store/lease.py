"""The right to write to a run on an object store: one driver at a time, wherever it runs.

As in ``models.io.lock``, leases have rising numbers, and the highest one counts. Stores that pyarrow opens replace an
object without asking, so a lease's name has its owner's identity in it: nobody's lease is ever replaced. Who takes one
looks again at what is there afterwards, and gives way to any other that lives; stores list what was published before
(S3, Google and Azure do). How long ago an owner gave a sign of life is told by the store's clock.

An owner that could not give a sign of life for a while asks who holds the lease before it publishes anything more.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from prunesweep.models.errors import UserError
from prunesweep.models.io import lock
from prunesweep.models.io.lock import Holder, Lost
from prunesweep.models.io.objects import Objects, Stamp

__all__ = ["LEASES", "Lease", "highest", "holder"]

LEASES = ".lease/"
ASKING = f"{LEASES}asking-"  # an object by which the store's clock is read
TRIES = 20
SURE = 2 / 3  # of the time after which an owner counts as gone: so long its last sign of life is enough for itself


def _now() -> float:
    """Seconds that go on while this process or machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Lease:
    """The right to write below a URL, for the time of a ``with`` block.

    Args:
        url: of the run.
        note: as for ``Objects``.
        on_lost: called, in a thread, where another process has taken over. ``check`` says it, too.
        stopped_by: what stops who holds it, for people; ``prunesweep stop`` or Ctrl-C by default.

    Attributes:
        before: the highest number that there was before this one; 0 where there was none.

    Raises:
        UserError: a live process holds it.
    """

    def __init__(
        self,
        url: str,
        note: Callable[[str], None],
        on_lost: Callable[[Lost], object],
        stopped_by: str | None = None,
    ) -> None:
        self._objects, self.on_lost = Objects(url, note), on_lost
        self._stopped_by = stopped_by or f"'prunesweep stop {url}', or Ctrl-C there"
        self.identity, self.number, self.before = uuid.uuid4().hex, 0, 0
        self._stop, self._beating, self._sure = threading.Event(), threading.Lock(), 0.0

    def __enter__(self) -> Lease:
        self._objects.check()
        for _ in range(TRIES):
            seen, now = self._look()
            for number, name in sorted(seen, reverse=True):
                if held := _held(self._objects, name, (now - seen[number, name].published) / 1e9):
                    raise UserError(self._in_use(held))
            self.before = max((number for number, _ in seen), default=0)
            self.number = self.before + 1
            self._touch()
            again, now = self._look()
            others = {key: stamp for key, stamp in again.items() if key[1] != self._name}
            if max((number for number, _ in others), default=0) < self.number and not any(
                _held(self._objects, name, (now - stamp.published) / 1e9) for (_, name), stamp in others.items()
            ):
                break
            self._objects.delete(self._name)  # another process asked at the same moment
            time.sleep(random.random())
        else:
            raise UserError(f"{self._objects.url}: too many processes try to take it at once")
        for _, name in others:
            self._objects.delete(name)
        threading.Thread(target=self._beat, daemon=True, name="lease").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """Raise Lost where another process has taken over, or may have: then that is asked."""
        if _now() - self._sure > SURE * lock.STALE:
            self._renew()

    def release(self, *, forget: bool = False) -> None:
        """Let others in; what another process has taken over is left to it.

        Args:
            forget: leave no trace, for there is nothing that was worked on.
        """
        with self._beating, contextlib.suppress(UserError, OSError):
            if not self._stop.is_set():
                self._stop.set()
                self._ask()
                if forget:
                    self._objects.delete(self._name)
                else:
                    self._touch(released=True)

    @property
    def _name(self) -> str:
        return f"{LEASES}{self.number:09d}-{self.identity}"

    def _look(self) -> tuple[dict[tuple[int, str], Stamp], int]:
        """Stamps of all leases by number and name, and the store's time."""
        asking = f"{ASKING}{self.identity}"
        self._objects.write(asking, b"{}")
        found = self._objects.list(LEASES)
        self._objects.delete(asking)
        now = found[asking].published if asking in found else time.time_ns()
        if not now:
            raise UserError(
                f"{self._objects.url}: it does not say when something was published, so it cannot be told whether "
                "a driver lives: take another one, such as s3, gs or abfs"
            )
        return _leases(found), now

    def _touch(self, *, released: bool = False) -> None:
        begun = _now()
        facts = {"identity": self.identity, "released": released, **lock.own_place()}
        self._objects.write(self._name, json.dumps(facts).encode())
        self._sure = begun

    def _ask(self) -> None:
        """Raise Lost where there is a higher number than this one, or another of this number."""
        found = _leases(self._objects.list(LEASES))
        if any(number >= self.number and name != self._name for number, name in found):
            raise Lost(
                f"{self._objects.url}: another process has taken over, because this one gave no sign of life for "
                f"{lock.STALE:.0f} seconds; nothing more is published"
            )

    def _renew(self) -> None:
        with self._beating:
            if not self._stop.is_set():
                self._ask()
                self._touch()

    def _beat(self) -> None:
        while not self._stop.wait(lock.BEAT):
            try:
                self._renew()
            except Lost as lost:
                self.on_lost(lost)
                return
            except (UserError, OSError):  # a store that does not answer now may do so later
                continue

    def _in_use(self, held: Holder) -> str:
        return (
            f"{self._objects.url} is in use by process {held.pid} on {held.host}, which gave a sign of life "
            f"{max(held.age, 0):.0f} s ago; wait for it or stop it ({self._stopped_by}). If it is gone, wait "
            f"{max(lock.STALE - held.age, 1):.0f} s"
        )


def holder(objects: Objects) -> tuple[dict[str, Any], float] | None:
    """What a live driver says of itself, and how many seconds ago; None where none lives. Changes nothing."""
    leases = _leases(objects.list(LEASES))
    if not leases:
        return None
    number, name = max(leases)
    age = time.time() - leases[number, name].published / 1e9
    facts = _facts(objects, name)
    return (facts, age) if facts is not None and _lives(facts, age) is not None else None


def highest(found: Iterable[str]) -> int:
    """The highest number of leases by their names; 0 where there is none."""
    return max((number for number, _ in _leases(dict.fromkeys(found, Stamp(0, 0)))), default=0)


def _leases(found: dict[str, Stamp]) -> dict[tuple[int, str], Stamp]:
    names = {name: name.removeprefix(LEASES).partition("-")[0] for name in found}
    return {(int(number), name): found[name] for name, number in names.items() if number.isdigit()}


def _facts(objects: Objects, name: str) -> dict[str, Any] | None:
    try:
        found = json.loads(objects.read(name))
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _lives(facts: dict[str, Any], age: float) -> Holder | None:
    try:
        if facts.get("released") or age > lock.STALE or lock.died(facts):
            return None
        return Holder(str(facts["host"]), int(facts["pid"]), age)
    except (ValueError, TypeError, KeyError):
        return Holder("an unknown host", 0, age)


def _held(objects: Objects, name: str, age: float) -> Holder | None:
    """Who holds a lease; None where its owner released it, is dead, or gives no sign of life."""
    facts = _facts(objects, name)
    return None if facts is None else _lives(facts, age)
