"""Turns a compressed-column matrix on disk into row blocks, through temporary files: a counting and a sorting pass.

Invariants: memory is bounded by the block size plus one count per cell; the columns of a row come out in order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

__all__ = ["CscRows", "row_bands"]


class Entries(NamedTuple):
    """Stored entries of consecutive columns: the row, column and value of each, all of one length."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


def row_bands(indptr: np.ndarray, *, max_values: int) -> np.ndarray:
    """Return bounds of consecutive row bands that hold at most `max_values` entries each, and at least one row.

    Examples
    --------
    >>> row_bands(np.array([0, 2, 4, 9, 9]), max_values=4).tolist()
    [0, 2, 3, 4]
    """
    bounds, num_rows = [0], len(indptr) - 1
    while bounds[-1] < num_rows:
        start = bounds[-1]
        stop = int(np.searchsorted(indptr, indptr[start] + max_values, side="right")) - 1
        bounds.append(max(start + 1, stop))
    return np.asarray(bounds, dtype=np.int64)


def _stable_order(keys: np.ndarray, *, limit: int) -> np.ndarray:
    """Return the stable sorting order; NumPy sorts 16-bit keys in linear time."""
    return np.argsort(keys.astype(np.uint16) if limit <= 1 << 16 else keys, kind="stable")


class CscRows:
    """The entries of a column-wise matrix, sorted into row bands in temporary files (in ``$TMPDIR``).

    Parameters
    ----------
    read_entries
        Gives the entries in column order, in blocks of bounded size; called twice.
    num_rows, dtype
        Rows of the matrix, and the type of its values.
    max_values
        Entries of a band at most (a band has at least one row).
    """

    def __init__(
        self, read_entries: Callable[[], Iterator[Entries]], *, num_rows: int, dtype: np.dtype, max_values: int
    ) -> None:
        per_row = np.zeros(num_rows, dtype=np.int64)
        for entries in read_entries():
            per_row += np.bincount(entries.rows, minlength=num_rows)
        self.indptr = np.concatenate([[0], np.cumsum(per_row)])
        self.bounds = row_bands(self.indptr, max_values=max_values)
        self._record = np.dtype([("row", np.int32), ("column", np.int32), ("value", dtype)])
        self._folder = tempfile.TemporaryDirectory(prefix="pertcast-csc-")
        self._path = Path(self._folder.name) / "entries"
        try:
            self._scatter(read_entries)
        except BaseException:
            self.close()
            raise

    def _scatter(self, read_entries: Callable[[], Iterator[Entries]]) -> None:
        next_entry = self.indptr[self.bounds[:-1]].copy()
        with self._path.open("wb") as stream:
            for rows, columns, values in read_entries():
                band_of = np.searchsorted(self.bounds, rows, side="right") - 1
                order = _stable_order(band_of, limit=len(next_entry))
                records = np.empty(len(rows), dtype=self._record)
                records["row"], records["column"], records["value"] = rows[order], columns[order], values[order]
                ends = np.cumsum(np.bincount(band_of, minlength=len(next_entry)))
                for band in np.flatnonzero(np.diff(ends, prepend=0)):
                    part = records[(ends[band - 1] if band else 0) : ends[band]]
                    stream.seek(int(next_entry[band]) * self._record.itemsize)
                    stream.write(part.tobytes())
                    next_entry[band] += len(part)

    def bands(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield ``(first row, indptr, column indices, values)`` of each band, rows and columns in order."""
        for start, stop in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            first, last = int(self.indptr[start]), int(self.indptr[stop])
            with self._path.open("rb") as stream:
                stream.seek(first * self._record.itemsize)
                records = np.fromfile(stream, dtype=self._record, count=last - first)
            order = _stable_order(records["row"] - np.int32(start), limit=int(stop - start))
            yield int(start), self.indptr[start : stop + 1] - first, records["column"][order], records["value"][order]

    def close(self) -> None:
        """Remove the temporary files."""
        self._folder.cleanup()

    def __enter__(self) -> CscRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
