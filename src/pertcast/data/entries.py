"""Arrays on disk that grow: .npy files that rows are appended to, and stored values that widen as they must.

Invariants: values lie in the narrowest of uint8, uint16, uint32 and float32 that holds all of them exactly.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pertcast.errors import DataError, Problem

__all__ = ["GrowingArray", "ValueArray"]

_LADDER = tuple(np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32, np.float32))
_BLOCK_VALUES = 1 << 22


class GrowingArray:
    """A one-dimensional .npy file that values are appended to."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.length = 0
        self._stream = path.open("wb")
        self._stream.write(self._header())

    def _header(self) -> bytes:
        # NumPy pads headers so that the length may grow in place
        stream = io.BytesIO()
        description = np.lib.format.dtype_to_descr(self.dtype)
        fields = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(stream, fields)
        return stream.getvalue()

    def append(self, values: np.ndarray) -> None:
        """Append values, converted to the type of the file."""
        self._stream.write(values.astype(self.dtype, copy=False).tobytes())
        self.length += len(values)

    def close(self) -> None:
        """Write the final length."""
        if not self._stream.closed:
            self._stream.seek(0)
            self._stream.write(self._header())
            self._stream.close()


class ValueArray:
    """Values of 0 or more on disk, in the narrowest type that holds those seen so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._array = GrowingArray(path, _LADDER[0])

    @property
    def dtype(self) -> np.dtype:
        """The number type so far."""
        return self._array.dtype

    def append(self, values: np.ndarray, *, place: str) -> None:
        """Append values, which come from `place`; what is there is rewritten where they need a wider type.

        Raises
        ------
        DataError
            If a whole number does not fit into 32 bits.
        """
        self.widen(_narrowest(values, place))
        self._array.append(values)

    def widen(self, dtype: np.dtype) -> None:
        """Rewrite what is there where `dtype` is wider."""
        if _LADDER.index(dtype) <= _LADDER.index(self.dtype):
            return
        self._array.close()
        old = self._path.with_name(f"{self._path.name}.narrow")
        self._path.replace(old)
        self._array = GrowingArray(self._path, dtype)
        before = np.load(old, mmap_mode="r")
        for start in range(0, len(before), _BLOCK_VALUES):
            self._array.append(before[start : start + _BLOCK_VALUES])
        del before
        old.unlink()

    def close(self) -> None:
        """Write the final length."""
        self._array.close()


def _narrowest(values: np.ndarray, place: str) -> np.dtype:
    if not len(values):
        return _LADDER[0]
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        return _LADDER[-1]
    largest = float(values.max())
    for dtype in _LADDER[:-1]:
        if largest < 2 ** (8 * dtype.itemsize):
            return dtype
    raise DataError(problems=[Problem(place, f"a count of {largest:,.0f} is too large", "give raw counts below 4e9")])
