"""How many processors this process may really use: affinity and the quota of its control group, not the machine's."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["available_cpus"]

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """Return the processors that this process may use, at least 1.

    Examples
    --------
    >>> 1 <= available_cpus() <= (os.cpu_count() or 1)
    True
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(there, _quota())))


def _quota() -> float:
    """Return the processors that the control group and those above it grant, infinity where none sets a quota."""
    try:
        lines = [line.split(":", 2) for line in _OWN_GROUP.read_text().splitlines()]
    except OSError:
        return math.inf
    granted = [math.inf]
    for _, controllers, own in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = _GROUPS / controllers if controllers else _GROUPS
        folder = base / own.lstrip("/")
        for group in (folder, *folder.parents):
            granted.append(_granted(group))
            if group == base:
                break
    return min(granted)


def _granted(group: Path) -> float:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
