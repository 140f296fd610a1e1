"""Reads the matrix X of an AnnData file in row blocks, however it lies on disk, in bounded memory.

Invariants: a block is CSR with sorted column indices and no duplicates, in the file's own number type; a broken matrix
is a DataError, never a crash or a wrong value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.bounds import require_plausible
from pertcast.files.csc import CscRows, Entries, row_bands
from pertcast.files.frames import reading

__all__ = ["DAMAGED", "Layout", "Matrix"]

Layout = Literal["csr", "csc", "dense"]
DAMAGED = "the file is damaged; write it again with anndata"


def _usable(dtype: np.dtype) -> np.dtype:
    """Return the nearest number type that SciPy computes with: no truth values, half floats or foreign byte order."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


def _rows_ascend(indices: np.ndarray, indptr: np.ndarray) -> bool:
    """Return whether the column indices of each row rise from entry to entry."""
    rises = np.empty(len(indices) + 1, dtype=bool)
    np.greater(indices[1:], indices[:-1], out=rises[1:-1])
    rises[indptr] = True
    return bool(rises.all())


class Matrix:
    """X of an open file.

    Parameters
    ----------
    path
        The file, for messages.
    file
        The same, opened with h5py.
    name
        Where the matrix is in it: ``X``, ``layers/counts``, ``raw/X``.

    Attributes
    ----------
    layout
        How X lies on disk: ``csr``, ``csc`` or ``dense``.
    dtype
        Its number type.
    shape
        Cells and genes.
    num_stored
        Stored entries, explicit zeros counted (dense: cells x genes).
    in_order
        Whether the rows read so far lay in the file with their column indices sorted.

    Raises
    ------
    DataError
        If X is no matrix of numbers in a layout of AnnData's, or larger than the file can hold.
    """

    def __init__(self, path: Path, file: Any, name: str = "X") -> None:
        self.in_order = True
        self._name = name
        self._path, self._file = path, file
        self._rows_of_csc: tuple[int, CscRows] | None = None
        self.layout: Layout
        with reading(path, name):
            self._open(file[name])
        if self.dtype.kind not in "fiub":
            self._broken(name, f"expected numbers, got {self.dtype}")

    def _open(self, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            if node.ndim != 2:
                raise ValueError(f"expected two dimensions, got {node.ndim}")
            require_plausible(node)
            self.layout, self.dtype, shape, self.num_stored = "dense", node.dtype, node.shape, int(node.size)
        else:
            kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "nothing"))
            kind = str(kind.decode() if isinstance(kind, bytes) else kind).removesuffix("_matrix")
            if kind not in ("csr", "csc"):
                raise ValueError(f"expected csr_matrix, csc_matrix or a dense array, got {kind}")
            self.layout = "csr" if kind == "csr" else "csc"
            shape = node.attrs["shape"] if "shape" in node.attrs else node.attrs["h5sparse_shape"]
            for name in ("data", "indices", "indptr"):
                require_plausible(node[name])
            self.dtype, self.num_stored = node["data"].dtype, int(node["data"].shape[0])
        self.shape = int(shape[0]), int(shape[1])

    def close(self) -> None:
        """Remove temporary files; chunks() may be called again."""
        if self._rows_of_csc is not None:
            self._rows_of_csc[1].close()
            self._rows_of_csc = None

    def _broken(self, part: str, message: str) -> None:
        raise DataError(problems=[Problem(f"{self._path}, {part}", message, DAMAGED)])

    def chunks(self, *, max_values: int = 1 << 24) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield ``(first row, block)`` of consecutive rows, CSR (rows, num_genes) in the file's number type.

        Parameters
        ----------
        max_values
            Stored entries of a block at most, which bounds memory; a block has at least one row. A column-wise file is
            sorted into rows through temporary files in ``$TMPDIR`` first, as large as the matrix.

        Raises
        ------
        DataError
            If indptr falls, a column index is out of range or stands twice in a row, or data cannot be read.
        """
        if self.layout == "dense":
            yield from self._dense_chunks(max_values)
        elif self.layout == "csr":
            yield from self._csr_chunks(max_values)
        else:
            yield from self._csc_chunks(max_values)

    def _dense_chunks(self, max_values: int) -> Iterator[tuple[int, sparse.csr_matrix]]:
        step = max(1, max_values // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            with reading(self._path, f"{self._name}, rows from {start}"):
                block = np.asarray(self._file[self._name][start : start + step])
            yield start, sparse.csr_matrix(block.astype(_usable(block.dtype), copy=False))

    def _indptr(self, length: int) -> np.ndarray:
        with reading(self._path, f"{self._name}/indptr"):
            node = self._file[f"{self._name}/indptr"]
            shapes = {name: self._file[f"{self._name}/{name}"].shape for name in ("data", "indices", "indptr")}
            for name in ("data", "indices"):
                if shapes[name] != (self.num_stored,):
                    self._broken(self._name, f"{shapes[name]} {name} for {self.num_stored} values")
            if shapes["indptr"] != (length + 1,):
                self._broken(f"{self._name}/indptr", f"expected {length + 1} entries, got {shapes['indptr']}")
            if node.dtype.kind not in "iu":
                self._broken(f"{self._name}/indptr", f"expected whole numbers, got {node.dtype}")
            indptr = np.asarray(node[()], dtype=np.int64)
        if indptr[0] != 0 or indptr[-1] != self.num_stored:
            self._broken(f"{self._name}/indptr", f"expected 0 to {self.num_stored}, got {indptr[0]} to {indptr[-1]}")
        falls = np.flatnonzero(np.diff(indptr) < 0)
        if len(falls):
            self._broken(f"{self._name}/indptr", f"it falls at position {falls[0] + 1}")
        return indptr

    def _stored(self, start: int, stop: int, *, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices (checked against `limit`) and the values of a range of stored entries."""
        with reading(self._path, f"{self._name}, stored entries from {start}"):
            indices = np.asarray(self._file[f"{self._name}/indices"][start:stop])
            values = np.asarray(self._file[f"{self._name}/data"][start:stop])
        if indices.dtype.kind not in "iu":
            self._broken(f"{self._name}/indices", f"expected whole numbers, got {indices.dtype}")
        if indices.size and (indices.min() < 0 or int(indices.max()) >= limit):
            wrong = int(np.flatnonzero((indices < 0) | (indices >= limit))[0])
            self._broken(
                f"{self._name}/indices", f"entry {start + wrong} is {indices[wrong]}, outside 0 to {limit - 1}"
            )
        return indices.astype(np.int32, copy=False), values.astype(_usable(values.dtype), copy=False)

    def _csr_chunks(self, max_values: int) -> Iterator[tuple[int, sparse.csr_matrix]]:
        indptr = self._indptr(self.shape[0])
        bounds = row_bands(indptr, max_values=max_values)
        for start, stop in itertools.pairwise(bounds):
            first, last = int(indptr[start]), int(indptr[stop])
            indices, values = self._stored(first, last, limit=self.shape[1])
            yield int(start), self._block(int(start), indptr[start : stop + 1] - first, indices, values)

    def _csc_entries(self, indptr: np.ndarray, max_values: int) -> Iterator[Entries]:
        for first in range(0, self.num_stored, max_values):
            last = min(first + max_values, self.num_stored)
            rows, values = self._stored(first, last, limit=self.shape[0])
            per_column = np.diff(np.clip(indptr, first, last))
            columns = np.repeat(np.arange(self.shape[1], dtype=np.int32), per_column)
            yield Entries(rows, columns, values)

    def _sorted_rows(self, indptr: np.ndarray, max_values: int) -> CscRows:
        try:
            return CscRows(
                lambda: self._csc_entries(indptr, max_values),
                num_rows=self.shape[0],
                dtype=_usable(self.dtype),
                max_values=max_values,
            )
        except OSError as error:
            place = f"{self._path}, {self._name} (csc)"
            message = f"its columns cannot be sorted into rows in the temporary folder ({error})"
            remedy = f"set TMPDIR to a disk with {self.num_stored * (8 + self.dtype.itemsize) / 1e9:.1f} GB free"
            raise DataError(problems=[Problem(place, message, remedy)]) from error

    def _csc_chunks(self, max_values: int) -> Iterator[tuple[int, sparse.csr_matrix]]:
        if self._rows_of_csc is None or self._rows_of_csc[0] != max_values:
            self.close()
            indptr = self._indptr(self.shape[1])
            self._rows_of_csc = (max_values, self._sorted_rows(indptr, max_values))
        for start, indptr, indices, values in self._rows_of_csc[1].bands():
            yield start, self._block(start, indptr, indices, values)

    def _block(self, start: int, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray) -> sparse.csr_matrix:
        shape = (len(indptr) - 1, self.shape[1])
        if len(values) <= np.iinfo(np.int32).max:
            indptr = indptr.astype(np.int32)
        block = sparse.csr_matrix((values, indices, indptr), shape=shape, copy=False)
        if _rows_ascend(indices, indptr):
            block.has_sorted_indices = block.has_canonical_format = True
            return block
        if not block.has_sorted_indices:
            self.in_order = False
            block.sort_indices()
        if not block.has_canonical_format:
            row = next(row for row in range(block.shape[0]) if (np.diff(block[row].indices) == 0).any())
            raise DataError(
                problems=[
                    Problem(
                        f"{self._path}, {self._name}, row {start + row}",
                        "a gene stands twice in this cell",
                        "call adata.X.sum_duplicates(), if the sum is what is meant, and write the file again",
                    )
                ]
            )
        return block
