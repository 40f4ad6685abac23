"""What a container leaves to its processes: CPU quota and memory limit of its control groups, versions 1 and 2."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

from prunesweep.models.errors import UserError

__all__ = ["check_shared_memory", "memory_kills", "usable_cpus", "usable_memory"]

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cpus(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Return how many CPUs this process may keep busy: those that it may run on, and no more than its quota pays for.

    A quota of a part of a CPU counts as one more.

    Args:
        groups: where the control groups are mounted; a container sees its own there.
        own: the file that names this process's groups.
    """
    cpus = len(os.sched_getaffinity(0))
    quotas = [quota for place in _places(groups, own, "cpu") if (quota := _quota(place)) is not None]
    return max(1, min([cpus, *map(math.ceil, quotas)]))


def check_shared_memory() -> None:
    """Check that processes can share locks, as logs and loaders of images need.

    Raises:
        UserError: they cannot, because nothing is mounted as /dev/shm, or it is full.
    """
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise UserError(
            f"processes cannot share memory here ({error.strerror}): /dev/shm is missing or full. Mount it (mount -t "
            "tmpfs tmpfs /dev/shm; for containers --shm-size or an emptyDir with medium: Memory), or make room"
        ) from error


def usable_memory(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Return how many bytes of memory this process and all others of its container may have together.

    Args:
        groups, own: as for ``usable_cpus``.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in _places(groups, own, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(place / name).strip()
            limits += [int(text)] if text.isdecimal() and int(text) else []  # or "max", or nothing
    return min(limits)


def memory_kills(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Return how many processes of this container the kernel has killed because their memory limit was reached.

    Args:
        groups, own: as for ``usable_cpus``.
    """
    found = [0]
    for place in _places(groups, own, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            for line in _read(place / name).splitlines():
                what, _, count = line.partition(" ")
                found += [int(count)] if what == "oom_kill" and count.isdecimal() else []
    return max(found)


def _places(groups: Path, own: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups that limit this process: its own, and all above it, as far as they are seen."""
    for line in (*_read(own).splitlines(), f"0::/\n0:{controller}:/"):
        for entry in line.splitlines():
            number, controllers, path = (*entry.split(":", 2), "", "")[:3]
            if not controllers and number == "0":
                root = groups
            elif controller in controllers.split(","):
                root = groups / controller
            else:
                continue
            place = root / path.strip("/")
            yield from (place, *(above for above in place.parents if above.is_relative_to(root)))


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):  # no control groups, or none of this name
        return ""


def _quota(place: Path) -> float | None:
    """Return CPUs per time, as cgroup v2's ``cpu.max`` or v1's ``cpu.cfs_quota_us`` limits them; None without limit."""
    given = _read(place / "cpu.max").split() or [_read(place / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        quota, period = map(float, given)
        return quota / period if quota > 0 else None
    except (ValueError, ZeroDivisionError):  # no limit, or "max"
        return None
