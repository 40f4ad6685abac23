"""What a container leaves to its processes: the CPU quota of its control group, versions 1 and 2."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["usable_cpus"]

GROUPS = Path("/sys/fs/cgroup")


def usable_cpus(groups: Path = GROUPS) -> int:
    """Return how many CPUs this process may keep busy: those that it may run on, and no more than its quota pays for.

    A quota of a part of a CPU counts as one more.

    Args:
        groups: where the control groups are mounted; a container sees its own there.
    """
    own = len(os.sched_getaffinity(0))
    quota = _quota(groups)
    return own if quota is None else max(1, min(own, math.ceil(quota)))


def _quota(groups: Path) -> float | None:
    """Return CPUs per time, as cgroup v2's ``cpu.max`` or v1's ``cpu.cfs_quota_us`` limits them; None without limit."""
    try:
        if (groups / "cpu.max").is_file():
            given, period = (groups / "cpu.max").read_text().split()
        else:
            given, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(given) / float(period) if float(given) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no control groups, or "max"
        return None
