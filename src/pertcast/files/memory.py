"""How this process gets and gives back its memory."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# parameters of mallopt, from glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Have this process keep memory that it frees, and use it again, from here on.

    glibc gives each large array its own pages and returns them once it is freed; a training step that makes and frees
    gigabytes of them spends a fifth of its time on having pages made anew. Peak memory grows by what lies unused
    between arrays, about a tenth.

    Returns
    -------
    bool
        Whether that was done; elsewhere than on Linux with glibc nothing is, and nothing is lost but time.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _PAD_BYTES, _ARENA_MAX: 1}
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted.items())
