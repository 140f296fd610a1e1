"""Read many short ranges of a .npy file in one compiled pass over its memory map."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np

__all__ = ["RangeFile"]


class RangeFile:
    """A one-dimensional .npy file, mapped into memory.

    Raises OSError or ValueError if it is missing or is no such file.

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
        self._path = path
        self._num_bytes = int(mapped.offset) + mapped.nbytes
        self._values = np.asarray(mapped)
        self.dtype: np.dtype = mapped.dtype

    def __len__(self) -> int:
        return len(self._values)

    def gather(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Return the values of ranges ``[start, stop)``, one after the other.

        Raises OSError if the file has become shorter: reading a map past its end would kill the process.
        """
        if self._path.stat().st_size < self._num_bytes:
            raise OSError(f"{self._path} has become shorter than {self._num_bytes:,} bytes")
        gathered = np.empty(int((stops - starts).sum()), dtype=self.dtype)
        _copy_ranges(self._values, starts, stops, gathered)
        return gathered


@numba.njit(nogil=True, cache=True)
def _copy_ranges(values: np.ndarray, starts: np.ndarray, stops: np.ndarray, into: np.ndarray) -> None:
    done = 0
    for i in range(len(starts)):
        for position in range(starts[i], stops[i]):
            into[done] = values[position]
            done += 1
