"""Processors, disk space and read-ahead threads.

The number of processors respects affinity and the quota of the control group, not the machine's total.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pertcast.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    items: Iterable[Item], work: Callable[[Item], Result], *, threads: int = 1, stopped: threading.Event | None = None
) -> Iterator[Result]:
    """Yield ``work(item)`` for each item, in order, computing the next ones in threads.

    `stopped` is set when no more results are wanted: work that takes long may look at it.

    >>> list(prefetch(range(4), lambda number: number**2, threads=3))
    [0, 1, 4, 9]
    """
    stream = iter(items)

    def next_result(may_draw: threading.Event, has_drawn: threading.Event) -> list[Result]:
        may_draw.wait()
        try:
            item = next(stream)
        except StopIteration:
            return []
        finally:
            has_drawn.set()
        return [work(item)]

    last_drawn = threading.Event()
    last_drawn.set()
    pending: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="pertcast-ahead") as executor:

        def submit() -> None:
            nonlocal last_drawn
            before, last_drawn = last_drawn, threading.Event()
            pending.append(executor.submit(next_result, before, last_drawn))

        try:
            for _ in range(threads):
                submit()
            while result := pending.popleft().result():
                submit()
                yield result.pop()  # the caller holds the only reference, so it is freed early
        finally:
            if stopped is not None:
                stopped.set()
            # Newest first, so that no started task waits for a cancelled one.
            while pending:
                pending.pop().cancel()


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # Parameters of glibc's mallopt
_MMAP_MAX_BEFORE, _TRIM_THRESHOLD_BEFORE = 1 << 16, 1 << 17


@contextmanager
def reused_memory() -> Iterator[None]:
    """Keep freed memory in this process, because new pages cost more than the arithmetic on them; glibc alone."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    assert libc is not None
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MMAP_MAX_BEFORE)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_THRESHOLD_BEFORE)
        libc.malloc_trim(0)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The error numbers of a full disk or a used-up quota."""
_SLACK_BYTES = 1 << 20


def size_text(size: float) -> str:
    """Return a number of bytes as text.

    >>> size_text(3_712_000_000), size_text(20_500)
    ('3.7 GB', '20.5 kB')
    """
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _folder_of(destination: Path) -> Path:
    folder = destination.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def require_space(destination: Path, needed: int, *, what: str) -> None:
    """Raise unless a disk has room for the output."""
    free = shutil.disk_usage(_folder_of(destination)).free
    if needed + _SLACK_BYTES > free:
        raise DataError(
            f"{destination}: {what} needs about {size_text(needed)}, and its disk has {size_text(free)} free; "
            "make room, or give another --out"
        )


def describe_write_error(destination: Path, error: Exception) -> str:
    """Return the message for an output that could not be written; HDF5 does not always report a full disk."""
    full = getattr(error, "errno", None) in DISK_FULL or "no space left" in str(error).lower()
    if not full:
        try:
            full = shutil.disk_usage(_folder_of(destination)).free < _SLACK_BYTES
        except OSError:
            full = False
    why = "the disk is full" if full else str(error).partition("\n")[0]
    return f"{destination}: cannot be written ({why}); make room, or give another --out; nothing there was changed"


_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """Return the number of processors that this process may use, at least 1.

    >>> 1 <= available_cpus() <= (os.cpu_count() or 1)
    True
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(there, _quota())))


def _quota() -> float:
    """Return the processors that the control groups grant; infinity without a quota."""
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
