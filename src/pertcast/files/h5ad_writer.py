"""Write an AnnData file row block by row block: X as CSR float32, obs, var, nothing else.

Invariants: the bytes depend on the rows alone, not on their blocks, the clock or the file's name. Stored entries are in
column order, without duplicates or explicit zeros. An unfinished file is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from pertcast.errors import DataError, Problem

_CHUNK_VALUES = (1 << 20) // 4
_STRING = h5py.string_dtype()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn HDF5's errors on a failing disk into an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path}: {error}") from error


class _Column:
    """A dataset that grows by whole chunks; a short one is written in one piece."""

    def __init__(self, group: Any, name: str, dtype: type[np.generic]) -> None:
        self._group, self._name = group, name
        self._chunk = np.zeros(_CHUNK_VALUES, dtype=dtype)
        self._filled = 0
        self._flushed = 0
        self._dataset: Any = None

    @property
    def room(self) -> int:
        return _CHUNK_VALUES - self._filled

    def append(self, values: np.ndarray) -> None:
        self._chunk[self._filled : self._filled + len(values)] = values
        self._filled += len(values)
        if not self.room:
            self._flush()

    def _flush(self) -> None:
        if self._dataset is None:
            self._dataset = self._group.create_dataset(
                self._name,
                shape=(0,),
                maxshape=(None,),
                chunks=(_CHUNK_VALUES,),
                dtype=self._chunk.dtype,
                track_times=False,
            )
        self._dataset.resize((self._flushed + self._filled,))
        self._chunk[self._filled :] = 0
        self._dataset.id.write_direct_chunk((self._flushed,), self._chunk.tobytes())
        self._flushed += self._filled
        self._filled = 0

    def finish(self) -> None:
        if self._dataset is None:
            self._group.create_dataset(self._name, data=self._chunk[: self._filled], track_times=False)
        elif self._filled:
            self._flush()


class CsrWriter:
    """Stream a minimal AnnData file; a context manager.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.h5ad"
    >>> with CsrWriter(path, ["TP53", "TET1"]) as writer:
    ...     writer.append(sparse.csr_matrix(np.eye(2)))
    ...     writer.finish(pd.DataFrame({"target_gene": ["TET1", "TET1"]}))
    """

    def __init__(self, path: Path, genes: Sequence[str]) -> None:
        if len(set(genes)) != len(genes):
            raise DataError(problems=[Problem(f"{path}, var_names", "gene names repeat", "give each gene once")])
        self._path = path
        self._genes = pd.Index(list(genes), dtype=object)
        self._finished = False
        self._rows_done = 0
        self._values_done = 0
        self._indptr: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
        self._file = h5py.File(path, "w")
        self._matrix = self._file.create_group("X")
        self._data = _Column(self._matrix, "data", np.float32)
        self._indices = _Column(self._matrix, "indices", np.int32)

    def __enter__(self) -> CsrWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _disk_errors(self._path):
                self._file.close()
        except OSError:
            self._finished = False
            # where one write has failed already, that error is the one to tell
            if error is None:
                raise
        finally:
            if not self._finished:
                self._path.unlink(missing_ok=True)
        if not self._finished and error is None:
            raise RuntimeError("CsrWriter.finish() was not called")

    def append(self, block: sparse.csr_matrix) -> None:
        """Append rows; values become float32, explicit zeros are dropped, duplicates are summed."""
        if block.shape[1] != len(self._genes):
            raise DataError(
                problems=[
                    Problem(
                        f"{self._path}, X",
                        f"expected rows of {len(self._genes)} genes, got {block.shape[1]}",
                        "give every block the genes of the file",
                    )
                ]
            )
        if not block.has_canonical_format:
            block = block.copy()
            block.sum_duplicates()
        data = block.data.astype(np.float32, copy=False)
        indptr, indices = block.indptr.astype(np.int64), block.indices
        kept = data != 0
        if not kept.all():
            before = np.concatenate([[0], np.cumsum(kept)])
            data, indices, indptr = data[kept], indices[kept], before[indptr]
        start = 0
        with _disk_errors(self._path):
            while start < len(data):
                # both columns reach the end of a chunk together, so that chunks lie in the file in one order
                part = slice(start, start + self._data.room)
                start = min(part.stop, len(data))
                self._data.append(data[part])
                self._indices.append(indices[part])
        self._indptr.append(indptr[1:] - indptr[0] + self._values_done)
        self._values_done += len(data)
        self._rows_done += block.shape[0]

    def finish(self, obs: pd.DataFrame) -> None:
        """Write obs (categorical, string and numeric columns; the index has the cells' names) and var."""
        if len(obs) != self._rows_done:
            raise DataError(
                problems=[
                    Problem(
                        f"{self._path}, obs",
                        f"expected {self._rows_done} rows as X has, got {len(obs)}",
                        "give one row of obs for each cell",
                    )
                ]
            )
        names = obs.index.astype(str)
        if not names.is_unique:
            first = names[names.duplicated()][0]
            raise DataError(
                problems=[Problem(f"{self._path}, obs_names", f"{first!r} names two cells", "name each cell once")]
            )
        with _disk_errors(self._path):
            self._write_rest(obs.set_axis(names, axis=0))
        self._finished = True

    def _write_rest(self, obs: pd.DataFrame) -> None:
        self._data.finish()
        self._indices.finish()
        indptr = np.concatenate(self._indptr)
        if indptr[-1] <= np.iinfo(np.int32).max:
            # as the indices: scipy turns no matrix into coordinates whose two kinds of index differ
            indptr = indptr.astype(np.int32)
        self._matrix.create_dataset("indptr", data=indptr, track_times=False)
        self._matrix.attrs["encoding-type"] = "csr_matrix"
        self._matrix.attrs["encoding-version"] = "0.1.0"
        self._matrix.attrs["shape"] = np.array([self._rows_done, len(self._genes)], dtype=np.int64)
        _write_table(self._file, "obs", obs)
        _write_table(self._file, "var", pd.DataFrame(index=self._genes))
        self._file.attrs["encoding-type"] = "anndata"
        self._file.attrs["encoding-version"] = "0.1.0"
        # a full disk is to be found here, not when the file is closed
        self._file.flush()


def _encode(node: Any, encoding: str, version: str) -> None:
    node.attrs["encoding-type"] = encoding
    node.attrs["encoding-version"] = version


def _write_array(group: Any, name: str, values: np.ndarray) -> None:
    node = group.create_dataset(name, data=values, track_times=False)
    _encode(node, "array", "0.2.0")


def _write_strings(group: Any, name: str, values: Sequence[object]) -> None:
    node = group.create_dataset(name, data=np.array(list(values), dtype=object), dtype=_STRING, track_times=False)
    _encode(node, "string-array", "0.2.0")


def _write_table(file: Any, name: str, frame: pd.DataFrame) -> None:
    group = file.create_group(name)
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", np.array(list(frame.columns), dtype=object), dtype=_STRING)
    _encode(group, "dataframe", "0.2.0")
    _write_strings(group, "_index", frame.index.tolist())
    for column in frame.columns:
        values = frame[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            node = group.create_group(column)
            node.attrs["ordered"] = False
            _encode(node, "categorical", "0.2.0")
            _write_strings(node, "categories", values.cat.categories.astype(str).tolist())
            _write_array(node, "codes", values.cat.codes.to_numpy())
        elif pd.api.types.is_numeric_dtype(values.dtype):
            _write_array(group, column, values.to_numpy())
        else:
            _write_strings(group, column, values.astype(str).tolist())
