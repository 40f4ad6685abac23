"""Look after the processes of a Ray of our own, from a process that Ray cannot stop.

``ray.init`` waits for half a minute or a whole one for a Ray that died while it started, in C++ and without letting any
thread of Python run, and then ends the process with exit code 1. So this file is a program as well, which needs nothing
but Python: it says that Ray died, ends the process that was starting it, and removes what is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

__all__ = ["MAIN", "children", "name_of", "named", "over", "started_at"]

MAIN = frozenset({"raylet", "gcs_server"})  # without one of which a Ray is dead
LOOK, LISTED = 0.05, 1.0  # seconds between looks, and between looks at what they have begun
OWN = 2.0  # seconds for the process that started Ray to notice by itself


def started_at(pid: int) -> str:
    """Return when a process began, which no other one of its number did; empty where the system does not tell."""
    return (_stat(pid) or [""] * 20)[19]


def name_of(pid: int) -> str:
    """Return the name of a process; empty where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def over(pid: int) -> bool:
    """Whether a process has ended, though its parent has not asked how: in containers, nobody may ever ask."""
    return (_stat(pid) or ["Z"])[0] == "Z"


def _stat(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def children(pid: int) -> dict[int, str]:
    """Processes that a process has begun, with the times when they began; none where the system does not tell."""
    found = dict[int, str]()
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= {int(child): started_at(int(child)) for child in listed.read_text().split()}
    return found


def named(folder: str) -> dict[int, str]:
    """Processes of Ray that were told of its folder, with the times when they began."""
    found = dict[int, str]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            if os.fsencode(folder) in line and b"/ray/" in line:
                found[int(path.parent.name)] = started_at(int(path.parent.name))
    return found


def _main(driver: int, folder: str, text: str) -> None:
    """Wait until the Ray in a folder is dead, or the process that started it has ended; see to it that both are gone.

    Args:
        driver: number of the process that started Ray.
        folder: the Ray's own.
        text: what to print if Ray died.
    """
    began, seen, died = started_at(driver), dict[int, str](), 0.0
    begun, due = dict[int, str](), time.monotonic()

    def going() -> bool:
        return not over(driver) and started_at(driver) == began

    def dead() -> bool:
        return any(over(pid) or started_at(pid) != started for pid, started in seen.items())

    while going():
        for pid, started in children(driver).items() if len(seen) < len(MAIN) else ():
            if name_of(pid) in MAIN:
                seen[pid] = started
        if time.monotonic() > due:
            begun, due = {child: at for pid in seen for child, at in children(pid).items()} or begun, due + LISTED
        if not died and dead():
            died = time.monotonic()
        if died and time.monotonic() > died + OWN:
            break
        time.sleep(LOOK)
    if died or dead():  # the second one: it ended the other process with it
        sys.stderr.write(f"{text}\n")
    if going():  # before the rest: were its connections cut, it would end with exit code 1
        os.kill(driver, signal.SIGQUIT)
        time.sleep(LOOK)
    for pid, started in (begun | named(folder)).items():
        if started_at(pid) == started:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), *sys.argv[2:])
