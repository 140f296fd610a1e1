"""Reads and writes AnnData files in bounded memory: row blocks in, row blocks out.

Invariants: a block is CSR with sorted column indices and no duplicates, in the file's own number type; a broken file
is a DataError, never a crash or a wrong value; the same rows appended give the same bytes whatever their blocks.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.csc import CscRows, Entries, row_bands
from pertcast.files.csr_writer import CsrWriter
from pertcast.files.frames import column_names, read_column, read_index, reading
from pertcast.files.raw import RawColumn, raw_column

__all__ = ["CsrWriter", "H5adReader", "open_h5ad"]

Layout = Literal["csr", "csc", "dense"]
_DAMAGED = "the file is damaged; write it again with anndata"


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


@contextmanager
def open_h5ad(path: Path) -> Iterator[H5adReader]:
    """Open a .h5ad or .h5 file in AnnData layout for reading.

    Raises
    ------
    DataError
        If it is missing, no HDF5 file, truncated, without X, obs or var, or its gene names repeat.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.h5ad"
    >>> with CsrWriter(path, ["TP53", "TET1"]) as writer:
    ...     writer.append(sparse.csr_matrix(np.eye(2)))
    ...     writer.finish(pd.DataFrame({"target_gene": ["TET1", "TET1"]}))
    >>> with open_h5ad(path) as reader:
    ...     reader.num_cells, reader.genes
    (2, ('TP53', 'TET1'))
    """
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise DataError(problems=[Problem(str(path), what, "give the path of a .h5ad file")])
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        with path.open("rb") as stream:
            truncated = stream.read(8) == b"\x89HDF\r\n\x1a\n"
        what = "the file is truncated or damaged" if truncated else "not an HDF5 file"
        remedy = "copy or download it again" if truncated else "give a .h5ad file, as anndata writes it"
        raise DataError(problems=[Problem(str(path), f"{what} ({error})", remedy)]) from error
    with file:
        with reading(path, "its structure"):
            reader = H5adReader(path, file)
        try:
            yield reader
        finally:
            reader.close()


class H5adReader:
    """An open AnnData file; made by :func:`open_h5ad`.

    Attributes
    ----------
    path
        The file.
    num_cells, num_genes
        Its shape.
    genes
        Names of the columns, unique.
    layout
        How X lies on disk: ``csr``, ``csc`` or ``dense``.
    dtype
        Number type of X.
    num_stored
        Stored entries of X, explicit zeros counted (dense: cells x genes).
    obs_columns, obsm_keys
        What annotations and embeddings there are.
    in_order
        Whether the rows read so far lay in the file with their column indices sorted.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self.in_order = True
        self._file = file
        self._descriptor = -1
        self._raw: dict[str, RawColumn | None] = {}
        self._rows_of_csc: tuple[int, CscRows] | None = None
        missing = [name for name in ("X", "obs", "var") if name not in file]
        if missing:
            found = ", ".join(file) or "nothing"
            raise DataError(
                problems=[
                    Problem(str(path), f"expected X, obs and var, got {found}", "give a file in AnnData layout (.h5ad)")
                ]
            )
        self.genes: tuple[str, ...] = tuple(read_index(file, path, "var"))
        self.layout: Layout
        with reading(path, "X"):
            self._open_matrix(file["X"])
        if self.dtype.kind not in "fiub":
            self._broken("X", f"expected numbers, got {self.dtype}")
        if len(self.genes) != self.num_genes:
            self._broken("var", f"{len(self.genes)} gene names for {self.num_genes} columns of X")
        repeated = [gene for gene, times in Counter(self.genes).items() if times > 1]
        if repeated:
            shown = ", ".join(map(repr, repeated[:5])) + (" ..." if len(repeated) > 5 else "")
            remedy = (
                "make them unique with adata.var_names_make_unique(), or drop the columns, and write the file again"
            )
            raise DataError(
                problems=[Problem(f"{path}, var_names", f"{len(repeated)} gene names repeat: {shown}", remedy)]
            )
        self.obs_columns = column_names(file, path, "obs")
        obsm = file.get("obsm")
        self.obsm_keys: tuple[str, ...] = tuple(obsm) if isinstance(obsm, h5py.Group) else ()

    def _open_matrix(self, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            if node.ndim != 2:
                raise ValueError(f"expected two dimensions, got {node.ndim}")
            self.layout, self.dtype, shape, self.num_stored = "dense", node.dtype, node.shape, int(node.size)
        else:
            kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "nothing"))
            kind = str(kind.decode() if isinstance(kind, bytes) else kind).removesuffix("_matrix")
            if kind not in ("csr", "csc"):
                raise ValueError(f"expected csr_matrix, csc_matrix or a dense array, got {kind}")
            self.layout = "csr" if kind == "csr" else "csc"
            shape = node.attrs["shape"] if "shape" in node.attrs else node.attrs["h5sparse_shape"]
            self.dtype, self.num_stored = node["data"].dtype, int(node["data"].shape[0])
        self.num_cells, self.num_genes = int(shape[0]), int(shape[1])

    def close(self) -> None:
        """Remove temporary files; :func:`open_h5ad` calls it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._raw.clear()
        if self._rows_of_csc is not None:
            self._rows_of_csc[1].close()
            self._rows_of_csc = None

    def _broken(self, part: str, message: str) -> None:
        raise DataError(problems=[Problem(f"{self.path}, {part}", message, _DAMAGED)])

    def obs(self, column: str) -> pd.Categorical:
        """Return an obs column (categorical, string or numeric) as strings; missing values have code -1.

        Raises
        ------
        DataError
            If there is no such column: its near-misses and the columns there are get named.
        """
        return read_column(self._file, self.path, column, num_rows=self.num_cells)

    def obs_names(self) -> np.ndarray:
        """Return the names of the cells, (num_cells,) str objects."""
        names = read_index(self._file, self.path, "obs")
        if len(names) != self.num_cells:
            self._broken("obs", f"{len(names)} names for {self.num_cells} rows of X")
        return names

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
        step = max(1, max_values // max(1, self.num_genes))
        for start in range(0, self.num_cells, step):
            with reading(self.path, f"X, rows from {start}"):
                block = np.asarray(self._file["X"][start : start + step])
            yield start, sparse.csr_matrix(block.astype(_usable(block.dtype), copy=False))

    def _indptr(self, length: int) -> np.ndarray:
        with reading(self.path, "X/indptr"):
            node = self._file["X/indptr"]
            shapes = {name: self._file[f"X/{name}"].shape for name in ("data", "indices", "indptr")}
            for name in ("data", "indices"):
                if shapes[name] != (self.num_stored,):
                    self._broken("X", f"{shapes[name]} {name} for {self.num_stored} values")
            if shapes["indptr"] != (length + 1,):
                self._broken("X/indptr", f"expected {length + 1} entries, got {shapes['indptr']}")
            if node.dtype.kind not in "iu":
                self._broken("X/indptr", f"expected whole numbers, got {node.dtype}")
            indptr = np.asarray(node[()], dtype=np.int64)
        if indptr[0] != 0 or indptr[-1] != self.num_stored:
            self._broken("X/indptr", f"expected 0 to {self.num_stored}, got {indptr[0]} to {indptr[-1]}")
        falls = np.flatnonzero(np.diff(indptr) < 0)
        if len(falls):
            self._broken("X/indptr", f"it falls at position {falls[0] + 1}")
        return indptr

    def _stored(self, start: int, stop: int, *, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices (checked against `limit`) and the values of a range of stored entries."""
        with reading(self.path, f"X, stored entries from {start}"):
            indices = self._entries("X/indices", start, stop)
            values = self._entries("X/data", start, stop)
        if indices.dtype.kind not in "iu":
            self._broken("X/indices", f"expected whole numbers, got {indices.dtype}")
        if indices.size and (indices.min() < 0 or int(indices.max()) >= limit):
            wrong = int(np.flatnonzero((indices < 0) | (indices >= limit))[0])
            self._broken("X/indices", f"entry {start + wrong} is {indices[wrong]}, outside 0 to {limit - 1}")
        return indices.astype(np.int32, copy=False), values.astype(_usable(values.dtype), copy=False)

    def _entries(self, name: str, start: int, stop: int) -> np.ndarray:
        if name not in self._raw:
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            self._raw[name] = raw_column(self._file[name], self._descriptor)
        raw = self._raw[name]
        return np.asarray(self._file[name][start:stop]) if raw is None else raw.read(start, stop)

    def _csr_chunks(self, max_values: int) -> Iterator[tuple[int, sparse.csr_matrix]]:
        indptr = self._indptr(self.num_cells)
        bounds = row_bands(indptr, max_values=max_values)
        for start, stop in itertools.pairwise(bounds):
            first, last = int(indptr[start]), int(indptr[stop])
            indices, values = self._stored(first, last, limit=self.num_genes)
            yield int(start), self._block(int(start), indptr[start : stop + 1] - first, indices, values)

    def _csc_entries(self, indptr: np.ndarray, max_values: int) -> Iterator[Entries]:
        for first in range(0, self.num_stored, max_values):
            last = min(first + max_values, self.num_stored)
            rows, values = self._stored(first, last, limit=self.num_cells)
            per_column = np.diff(np.clip(indptr, first, last))
            columns = np.repeat(np.arange(self.num_genes, dtype=np.int32), per_column)
            yield Entries(rows, columns, values)

    def _sorted_rows(self, indptr: np.ndarray, max_values: int) -> CscRows:
        try:
            return CscRows(
                lambda: self._csc_entries(indptr, max_values),
                num_rows=self.num_cells,
                dtype=_usable(self.dtype),
                max_values=max_values,
            )
        except OSError as error:
            place = f"{self.path}, X (csc)"
            message = f"its columns cannot be sorted into rows in the temporary folder ({error})"
            remedy = f"set TMPDIR to a disk with {self.num_stored * (8 + self.dtype.itemsize) / 1e9:.1f} GB free"
            raise DataError(problems=[Problem(place, message, remedy)]) from error

    def _csc_chunks(self, max_values: int) -> Iterator[tuple[int, sparse.csr_matrix]]:
        if self._rows_of_csc is None or self._rows_of_csc[0] != max_values:
            self.close()
            indptr = self._indptr(self.num_genes)
            self._rows_of_csc = (max_values, self._sorted_rows(indptr, max_values))
        for start, indptr, indices, values in self._rows_of_csc[1].bands():
            yield start, self._block(start, indptr, indices, values)

    def _block(self, start: int, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray) -> sparse.csr_matrix:
        shape = (len(indptr) - 1, self.num_genes)
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
                        f"{self.path}, X, row {start + row}",
                        "a gene stands twice in this cell",
                        "call adata.X.sum_duplicates(), if the sum is what is meant, and write the file again",
                    )
                ]
            )
        return block

    def embedding(self, key: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of ``obsm[key]``, float32 (stop - start, dimensions).

        Raises
        ------
        DataError
            If there is no such embedding, or it is no two-dimensional array with a row for each cell.
        """
        if key not in self.obsm_keys:
            known = ", ".join(self.obsm_keys) or "none"
            raise DataError(
                problems=[
                    Problem(
                        f"{self.path}, obsm",
                        f"no embedding {key!r}; there is {known}",
                        "mend model.input = 'obsm:NAME'",
                    )
                ]
            )
        node = self._file["obsm"][key]
        if not isinstance(node, h5py.Dataset) or node.ndim != 2 or node.shape[0] != self.num_cells:
            self._broken(f"obsm[{key!r}]", f"expected a dense array of {self.num_cells} rows")
        with reading(self.path, f"obsm[{key!r}]"):
            return np.asarray(node[start:stop], dtype=np.float32)
