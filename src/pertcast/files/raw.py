"""Reads one-dimensional HDF5 datasets past HDF5, with plain reads at the places where their bytes lie.

Several times as fast as HDF5's own reads, and other threads go on meanwhile. Invariant: what is not stored as plain
bytes in the file itself (filters, foreign byte order, external or virtual storage, holes) is left to HDF5.
"""

from __future__ import annotations

import os
from typing import Any

import h5py
import numpy as np

from pertcast.files.ranges import read_exactly

__all__ = ["RawColumn", "raw_column"]


class RawColumn:
    """A dataset whose bytes lie plainly in an open file; made by :func:`raw_column`."""

    def __init__(self, descriptor: int, dtype: np.dtype, chunk: int, offsets: np.ndarray) -> None:
        self._descriptor, self._dtype = descriptor, dtype
        self._chunk, self._offsets = chunk, offsets

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the values from `start` to `stop`.

        Raises
        ------
        OSError
            If the file ends before them.
        """
        values = np.empty(stop - start, dtype=self._dtype)
        into, size = memoryview(values.data).cast("B"), self._dtype.itemsize
        while start < stop:
            piece, within = divmod(start, self._chunk)
            number = min(self._chunk - within, stop - start)
            read_exactly(self._descriptor, into[: number * size], int(self._offsets[piece]) + within * size)
            into, start = into[number * size :], start + number
        return values


def raw_column(dataset: Any, descriptor: int) -> RawColumn | None:
    """Return a way to read a dataset without HDF5, or ``None`` where its bytes do not lie plainly.

    Parameters
    ----------
    dataset
        An h5py dataset.
    descriptor
        The same file, open for reading.
    """
    if not hasattr(os, "preadv") or not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or not dataset.size:
        return None
    dtype, created = dataset.dtype, dataset.id.get_create_plist()
    plain = dtype.kind in "fiu" and dtype.isnative and not created.get_nfilters() and not dataset.is_virtual
    if not plain or dataset.external or dataset.file.userblock_size:
        return None
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return None if offset is None else RawColumn(descriptor, dtype, dataset.size, np.array([offset]))
    chunk = dataset.chunks[0]
    offsets = np.full(-(-dataset.size // chunk), -1, dtype=np.int64)

    def note(info: Any) -> None:
        if info.size == chunk * dtype.itemsize and info.chunk_offset[0] // chunk < len(offsets):
            offsets[info.chunk_offset[0] // chunk] = info.byte_offset

    dataset.id.chunk_iter(note)
    return RawColumn(descriptor, dtype, chunk, offsets) if (offsets >= 0).all() else None
