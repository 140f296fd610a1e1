"""Many short ranges of a .npy file, in any order, at the cost of their own bytes.

A memory map would do, but reads megabytes ahead of each place that is touched for the first time, and all that it has
touched counts as the process's memory. Here the system is told all ranges before the first is read, so that the disk
works on them at once.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np

__all__ = ["RangeFile", "read_exactly"]


def read_exactly(descriptor: int, into: memoryview, offset: int) -> None:
    """Fill `into` with the bytes from `offset`.

    Raises
    ------
    OSError
        If the file ends before them.
    """
    while into:
        done = os.preadv(descriptor, [into], offset)
        if not done:
            raise OSError(f"the file ends at byte {offset:,}, before its values do")
        into, offset = into[done:], offset + done


class RangeFile:
    """A one-dimensional .npy file, opened for reading.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    dtype
        Type of its values.

    Raises
    ------
    OSError, ValueError
        If it is not there, or no such file.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.npy"
    >>> np.save(path, np.arange(10))
    >>> RangeFile(path).gather(np.array([7, 0]), np.array([10, 2])).tolist()
    [7, 8, 9, 0, 1]
    """

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        if mapped.ndim != 1 or not isinstance(mapped, np.memmap):
            raise ValueError(f"expected one dimension, got {mapped.ndim}")
        self.dtype: np.dtype = mapped.dtype
        self._length, self._offset = len(mapped), int(mapped.offset)
        self._mapped = None if hasattr(os, "preadv") else np.asarray(mapped)
        if self._mapped is None:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self._length

    def gather(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Return the values of ranges ``[start, stop)``, one after the other.

        Raises
        ------
        OSError
            If the file is shorter than it was when it was opened.
        """
        ends = np.cumsum(stops - starts)
        values = np.empty(int(ends[-1]) if len(ends) else 0, dtype=self.dtype)
        if self._mapped is not None:
            for start, stop, end in zip(starts.tolist(), stops.tolist(), ends.tolist(), strict=True):
                values[end - (stop - start) : end] = self._mapped[start:stop]
            return values
        size, into = self.dtype.itemsize, memoryview(values.data).cast("B") if values.size else memoryview(b"")
        places = (starts * size + self._offset).tolist()
        lengths = ((stops - starts) * size).tolist()
        if hasattr(os, "posix_fadvise"):
            for place, length in sorted(zip(places, lengths, strict=True)):
                os.posix_fadvise(self._descriptor, place, length, os.POSIX_FADV_WILLNEED)
        done = 0
        for place, length in zip(places, lengths, strict=True):
            read_exactly(self._descriptor, into[done : done + length], place)
            done += length
        return values
