"""Read AnnData files in bounded memory, in row blocks, and short ranges of .npy files.

Invariants: a block is CSR with sorted column indices and no duplicates, in the file's own number type. A broken file is
a DataError, never a crash or a wrong value.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.obs import (
    column_names,
    index_length,
    read_column,
    read_index,
    reading,
    require_plausible,
    wrong_kind,
)
from pertcast.stats.groups import compiled, copy_block


class Entries(NamedTuple):
    """Stored entries of consecutive columns: row, column and value of each."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


def row_bands(indptr: np.ndarray, *, max_values: int) -> np.ndarray:
    """Return bounds of consecutive row bands with at most `max_values` entries each, and at least one row.

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
    """Sort the entries of a column-wise matrix into row bands, in temporary files in ``$TMPDIR``."""

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
        """Yield ``(first row, indptr, column indices, values)`` of each band, in order."""
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


Layout = Literal["csr", "csc", "dense"]
DAMAGED = "the file is damaged; write it again with anndata"


def _usable(dtype: np.dtype) -> np.dtype:
    """Return the nearest number type that SciPy supports: no booleans, half floats or foreign byte order."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


class Matrix:
    """A matrix of an open file, read in row blocks."""

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
        """Yield ``(first row, block)`` of consecutive rows, CSR (rows, num_genes) in the file's number type."""
        if self.layout == "dense":
            step = max(1, max_values // max(1, self.shape[1]))
            for start in range(0, self.shape[0], step):
                with reading(self._path, f"{self._name}, rows from {start}"):
                    block = np.asarray(self._file[self._name][start : start + step])
                yield start, sparse.csr_matrix(block.astype(_usable(block.dtype), copy=False))
        elif self.layout == "csr":
            yield from self._csr_chunks(max_values)
        else:
            yield from self._csc_chunks(max_values)

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
        """Return the checked indices and the values of a range of stored entries."""
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
        rises = np.empty(len(indices) + 1, dtype=bool)
        np.greater(indices[1:], indices[:-1], out=rises[1:-1])
        rises[indptr] = True
        if bool(rises.all()):
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
                        "a gene occurs twice in this cell",
                        "call adata.X.sum_duplicates(), if the sum is intended, and write the file again",
                    )
                ]
            )
        return block


@contextmanager
def open_h5ad(path: Path, *, layer: str | None = None) -> Iterator[H5adReader]:
    """Open a .h5ad or .h5 file in AnnData layout: X, ``layers[layer]``, or raw.X for "raw".

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.h5ad"
    >>> from pertcast.files.h5ad_writer import CsrWriter
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
    if (kind := wrong_kind(path)) and kind != "an HDF5 file":
        raise DataError(problems=[Problem(str(path), f"it is {kind}")])
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
            reader = H5adReader(path, file, layer)
        try:
            yield reader
        finally:
            reader.close()


class H5adReader:
    """An open AnnData file, made by :func:`open_h5ad`."""

    def __init__(self, path: Path, file: Any, layer: str | None = None) -> None:
        self.path = path
        self._file = file
        missing = [name for name in ("X", "obs", "var") if name not in file]
        if missing:
            found = ", ".join(file) or "nothing"
            raise DataError(
                problems=[
                    Problem(str(path), f"expected X, obs and var, got {found}", "give a file in AnnData layout (.h5ad)")
                ]
            )
        layers = file.get("layers")
        self.layers: tuple[str, ...] = tuple(layers) if isinstance(layers, h5py.Group) else ()
        if "raw" in file and "X" in file["raw"] and "raw" not in self.layers:
            self.layers += ("raw",)
        if layer is not None and layer not in self.layers:
            message = f"expected the layer {layer!r}, got {', '.join(map(repr, self.layers)) or 'none'}"
            raise DataError(problems=[Problem(f"{path}, layers", message, "set columns.layer to one of these")])
        self.matrix_name = "X" if layer is None else f"layers/{layer}"
        var = "var"
        if layer == "raw" and self.matrix_name not in file:
            self.matrix_name, var = "raw/X", "raw/var"
        self.genes: tuple[str, ...] = tuple(read_index(file, path, var))
        self._matrix = Matrix(path, file, self.matrix_name)
        self.num_cells, self.num_genes = self._matrix.shape
        self.layout: Layout = self._matrix.layout
        self.dtype, self.num_stored = self._matrix.dtype, self._matrix.num_stored
        named = index_length(file, path, "obs")
        if named != self.num_cells:
            self._broken("obs", f"{named} names for {self.num_cells} rows of X")
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

    @property
    def in_order(self) -> bool:
        """Whether the rows read so far had sorted column indices."""
        return self._matrix.in_order

    def close(self) -> None:
        """Remove temporary files; :func:`open_h5ad` calls it."""
        self._matrix.close()

    def _broken(self, part: str, message: str) -> None:
        raise DataError(problems=[Problem(f"{self.path}, {part}", message, DAMAGED)])

    def obs(self, column: str) -> pd.Categorical:
        """Return an obs column as strings; missing values have code -1."""
        return read_column(self._file, self.path, column, num_rows=self.num_cells)

    def obs_names(self) -> np.ndarray:
        """Return the names of the cells as str objects."""
        return read_index(self._file, self.path, "obs")

    def log_base(self) -> float | None:
        """Return the base of the logarithm that scanpy recorded in ``uns["log1p"]``, or ``None``."""
        node = self._file.get("uns/log1p/base")
        if not isinstance(node, h5py.Dataset) or node.shape != () or node.dtype.kind not in "iuf":
            return None
        base = float(node[()])
        return base if base > 1 else None

    def chunks(self, *, max_values: int = 1 << 24) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield ``(first row, block)`` of consecutive rows; see :meth:`pertcast.files.h5ad.Matrix.chunks`."""
        return self._matrix.chunks(max_values=max_values)

    def embedding(self, key: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of ``obsm[key]``, float32 (stop - start, dimensions)."""
        if key not in self.obsm_keys:
            known = ", ".join(self.obsm_keys) or "none"
            raise DataError(
                problems=[
                    Problem(
                        f"{self.path}, obsm",
                        f"no embedding {key!r}; there is {known}",
                        "correct model.input = 'obsm:NAME'",
                    )
                ]
            )
        node = self._file["obsm"][key]
        if not isinstance(node, h5py.Dataset) or node.ndim != 2 or node.shape[0] != self.num_cells:
            self._broken(f"obsm[{key!r}]", f"expected a dense array of {self.num_cells} rows")
        with reading(self.path, f"obsm[{key!r}]"):
            require_plausible(node)
            return np.asarray(node[start:stop], dtype=np.float32)


class RangeFile:
    """A one-dimensional .npy file, mapped into memory.

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
        self._offset, self._num_bytes = int(mapped.offset), int(mapped.offset) + mapped.nbytes
        self._values = np.asarray(mapped)
        self.dtype: np.dtype = mapped.dtype
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> np.ndarray:
        """The mapped values; :meth:`require_whole` first, since reading past the end of a file kills the process."""
        return self._values

    def require_whole(self) -> None:
        """Raise OSError if the file has become shorter since it was opened."""
        if os.fstat(self._descriptor).st_size < self._num_bytes:
            raise OSError(f"{self._path} has become shorter than {self._num_bytes:,} bytes")

    def announce(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Tell the system which ranges are read next: it reads all at once, and nothing around them."""
        if hasattr(os, "posix_fadvise"):
            size = self.dtype.itemsize
            lengths = ((stops - starts) * size).tolist()
            for start, length in zip((starts * size + self._offset).tolist(), lengths, strict=True):
                os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def gather(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Return the values of ranges ``[start, stop)``, one after the other."""
        self.require_whole()
        gathered = np.empty(int((stops - starts).sum()), dtype=self.dtype)
        _copy_ranges(self._values, starts, stops, gathered)
        return gathered


@compiled
def _copy_ranges(values: np.ndarray, starts: np.ndarray, stops: np.ndarray, into: np.ndarray) -> None:
    done = 0
    for i in range(len(starts)):
        copy_block(into, done, values, starts[i], stops[i] - starts[i])
        done += stops[i] - starts[i]
