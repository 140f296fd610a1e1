"""The arrays of a store on disk: append values, and read those of any cells.

The highly variable genes of each cell are stored a second time if they are few, so that a network that reads 2,000 of
18,080 genes reads an eighth of the bytes.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.h5ad import RangeFile, row_bands
from pertcast.files.resources import available_cpus
from pertcast.progress import Advance
from pertcast.stats.groups import compiled, copy_block

_LADDER = tuple(np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32, np.float32))
_WIDEN_BLOCK_VALUES = 1 << 22


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
    """Append values to a file in the narrowest integer or float type that holds them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._array = GrowingArray(path, _LADDER[0])

    @property
    def dtype(self) -> np.dtype:
        """The number type so far."""
        return self._array.dtype

    def append(self, values: np.ndarray, *, place: str) -> None:
        """Append values from `place`; the file is rewritten if they need a wider type."""
        self.widen(_narrowest(values, place))
        self._array.append(values)

    def widen(self, dtype: np.dtype) -> None:
        """Rewrite the file if `dtype` is wider."""
        if _LADDER.index(dtype) <= _LADDER.index(self.dtype):
            return
        self._array.close()
        old = self._path.with_name(f"{self._path.name}.narrow")
        self._path.replace(old)
        self._array = GrowingArray(self._path, dtype)
        before = np.load(old, mmap_mode="r")
        for start in range(0, len(before), _WIDEN_BLOCK_VALUES):
            self._array.append(before[start : start + _WIDEN_BLOCK_VALUES])
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


HVG_PREFIX = "hvg_"
_SMALLEST_TABLE, _LARGEST_TABLE = 64, 256
_HVG_BLOCK_VALUES = 1 << 20
_MOST_GENES = 0.5
_SHARED_VALUES = 1 << 18


class StoredValues:
    """Stored values of cells, opened for reading."""

    def __init__(self, folder: Path, *, num_genes: int, prefix: str = "") -> None:
        self._num_genes = num_genes
        self._indptr = np.load(folder / f"{prefix}indptr.npy", allow_pickle=False)
        self._indices = RangeFile(folder / f"{prefix}indices.npy")
        self._data = RangeFile(folder / f"{prefix}data.npy")
        self.num_values = len(self._data)
        if len(self._indices) != self.num_values or int(self._indptr[-1]) != self.num_values:
            raise ValueError(f"{prefix}indptr, {prefix}indices and {prefix}data do not fit each other")
        self._is_announced = np.zeros(len(self._indptr) - 1, dtype=bool)
        self._fits_memory = self.num_values * (self._data.dtype.itemsize + 2) < _memory_bytes() // 2

    def __len__(self) -> int:
        return len(self._indptr) - 1

    def _announce(self, rows: np.ndarray) -> None:
        """Have the disk read rows ahead; rows of a store that stays in memory need it once."""
        for file in (self._indices, self._data):
            file.require_whole()
        cold = rows[~self._is_announced[rows]] if self._fits_memory else rows
        if len(cold):
            for file in (self._indices, self._data):
                file.announce(self._indptr[cold], self._indptr[cold + 1])
            self._is_announced[cold] = True

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the stored values of rows, CSR (len(rows), genes)."""
        self._announce(rows)
        starts, stops = self._indptr[rows], self._indptr[rows + 1]
        indices = self._indices.gather(starts, stops).astype(np.int32)
        values = self._data.gather(starts, stops)
        indptr = np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64)
        return sparse.csr_matrix((values, indices, indptr), shape=(len(rows), self._num_genes), copy=False)

    def write_log1p(
        self, rows: np.ndarray, factors: np.ndarray | None, out: np.ndarray, *, positions: np.ndarray | None = None
    ) -> None:
        """Write the log1p values of rows into `out`, zeros (len(rows), genes), in one compiled pass.

        `factors` normalise counts; without them the values are log1p already. `positions` are the columns of genes in
        `out`, -1 for those that are not wanted.
        """
        self._announce(rows)
        write_rows((self._indptr, self._indices.values, self._data.values), rows, factors, out, positions=positions)

    def pack(self, rows: np.ndarray, array: Callable[[str, int, np.dtype], np.ndarray]) -> tuple[np.ndarray, ...]:
        """Copy the stored values of rows into arrays that the caller provides; return starts, columns and values.

        Threads share the rows: a compiled copy needs no interpreter.
        """
        self._announce(rows)
        packed = array("starts", len(rows) + 1, np.dtype(np.int64))
        packed[0] = 0
        np.cumsum(self._indptr[rows + 1] - self._indptr[rows], out=packed[1:])
        columns, values = (
            array(name, int(packed[-1]), file.dtype)
            for name, file in (("columns", self._indices), ("values", self._data))
        )
        stored = (self._indptr, self._indices.values, self._data.values)
        num_threads = available_cpus() if packed[-1] > _SHARED_VALUES else 1
        bounds = np.searchsorted(packed, np.linspace(0, packed[-1], num_threads + 1)).tolist()
        bounds[-1] = len(rows)
        shares = [
            _threads().submit(_copy_rows, *stored, rows, first, last, packed, columns, values)
            for first, last in itertools.pairwise(bounds)
        ]
        for share in shares:
            share.result()
        return packed, columns, values

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The whole stored values in memory: starts of cells, columns, values."""
        for file in (self._indices, self._data):
            file.require_whole()
        return self._indptr, np.array(self._indices.values), np.array(self._data.values)

    @property
    def num_bytes(self) -> int:
        """The size of these arrays."""
        return int(self._indptr.nbytes + self.num_values * (self._indices.dtype.itemsize + self._data.dtype.itemsize))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(available_cpus(), thread_name_prefix="pertcast-copy")


@compiled
def _copy_rows(
    indptr: Any,
    columns: Any,
    values: Any,
    rows: Any,
    first: int,
    last: int,
    starts: Any,
    to_columns: Any,
    to_values: Any,
) -> None:
    for i in range(first, last):
        begin, number = indptr[rows[i]], indptr[rows[i] + 1] - indptr[rows[i]]
        copy_block(to_columns, starts[i], columns, begin, number)
        copy_block(to_values, starts[i], values, begin, number)


def write_rows(
    stored: tuple[np.ndarray, np.ndarray, np.ndarray],
    rows: np.ndarray,
    factors: np.ndarray | None,
    out: np.ndarray,
    *,
    positions: np.ndarray | None = None,
) -> None:
    """Write log1p values of rows of stored arrays (starts, columns, values) into zeros; see `write_log1p`."""
    indptr = stored[0]
    at = np.zeros(0, dtype=np.int64) if positions is None else positions
    if factors is None:
        _write_values(*stored, rows, at, out)
        return
    # most counts are small: their log1p is looked up, and computed once for each cell
    num_values = int((indptr[rows + 1] - indptr[rows]).sum())
    size = int(np.clip(num_values // max(4 * len(rows), 1), _SMALLEST_TABLE, _LARGEST_TABLE))
    table = np.log1p(np.arange(size, dtype=np.float32) * factors[:, None])
    if num_large := _write_counts(*stored, rows, at, table, factors, out):
        large = np.empty((num_large, 2), dtype=np.int64)
        _find_large(*stored, rows, at, size, large)
        out[large[:, 0], large[:, 1]] = np.log1p(out[large[:, 0], large[:, 1]])


@compiled
def _write_values(indptr: Any, columns: Any, values: Any, rows: Any, positions: Any, out: Any) -> None:
    for i in range(len(rows)):
        line, first, last = out[i], indptr[rows[i]], indptr[rows[i] + 1]
        seen, found = columns[first:last], values[first:last]
        for k in range(len(seen)):
            if not len(positions):
                line[seen[k]] = found[k]
            elif positions[seen[k]] >= 0:
                line[positions[seen[k]]] = found[k]


@compiled
def _write_counts(
    indptr: Any, columns: Any, values: Any, rows: Any, positions: Any, table: Any, factors: Any, out: Any
) -> int:
    """Write log1p of small counts and the normalised value of large ones; return the number of large ones."""
    num_large = 0
    for i in range(len(rows)):
        # views of one row: their indices need no arithmetic, and unsigned ones no check
        line, logs, factor, first, last = out[i], table[i], factors[i], indptr[rows[i]], indptr[rows[i] + 1]
        seen, counts = columns[first:last], values[first:last]
        if not len(positions):
            for k in range(len(seen)):
                if counts[k] < len(logs):
                    line[seen[k]] = logs[counts[k]]
                else:
                    line[seen[k]] = np.float32(counts[k]) * factor
                    num_large += 1
            continue
        for k in range(len(seen)):
            column = positions[seen[k]]
            if column >= 0:
                line[column] = logs[counts[k]] if counts[k] < len(logs) else np.float32(counts[k]) * factor
                num_large += counts[k] >= len(logs)
    return num_large


@compiled
def _find_large(indptr: Any, columns: Any, values: Any, rows: Any, positions: Any, size: int, found: Any) -> None:
    number = 0
    for i in range(len(rows)):
        first, last = indptr[rows[i]], indptr[rows[i] + 1]
        seen, counts = columns[first:last], values[first:last]
        for k in range(len(seen)):
            if counts[k] >= size:
                column = positions[seen[k]] if len(positions) else np.int64(seen[k])
                if column >= 0:
                    found[number, 0], found[number, 1] = i, column
                    number += 1


def _memory_bytes() -> int:
    """Return the main memory of this machine, 0 if the system does not tell."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    return int(np.prod([os.sysconf(name) for name in names])) if hasattr(os, "sysconf") else 0


def worth_a_copy(num_hvgs: int, num_genes: int) -> bool:
    """Return whether the highly variable genes are few enough for a second copy."""
    return 0 < num_hvgs <= _MOST_GENES * num_genes


def write_hvg_values(folder: Path, hvg: np.ndarray, *, num_genes: int, advance: Advance) -> None:
    """Write the values of some genes again, in one pass over all values."""
    indptr = np.load(folder / "indptr.npy")
    columns, values = (np.load(folder / name, mmap_mode="r") for name in ("indices.npy", "data.npy"))
    is_hvg, place = np.zeros(num_genes, dtype=bool), np.zeros(num_genes, dtype=columns.dtype)
    is_hvg[hvg], place[hvg] = True, np.arange(len(hvg))
    num_values = np.zeros(len(indptr) - 1, dtype=np.int64)
    out_columns = GrowingArray(folder / f"{HVG_PREFIX}indices.npy", columns.dtype)
    out_values = GrowingArray(folder / f"{HVG_PREFIX}data.npy", values.dtype)
    try:
        for start, stop in itertools.pairwise(row_bands(indptr, max_values=_HVG_BLOCK_VALUES)):
            part = slice(int(indptr[start]), int(indptr[stop]))
            kept = np.flatnonzero(is_hvg[columns[part]])
            out_columns.append(place[columns[part][kept]])
            out_values.append(values[part][kept])
            num_values[start:stop] = np.diff(np.searchsorted(kept, indptr[start : stop + 1] - indptr[start]))
            advance(int(stop - start))
    finally:
        out_columns.close()
        out_values.close()
    np.save(folder / f"{HVG_PREFIX}indptr.npy", np.concatenate([[0], np.cumsum(num_values)]))
