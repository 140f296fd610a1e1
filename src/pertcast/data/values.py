"""Stored values of cells: columns and values on disk, row pointers in memory; all genes, or the highly variable alone.

The highly variable genes of each cell lie together a second time, where they are few: a network that reads 2,000 of
18,080 genes then reads an eighth of the bytes, and need not look for its columns among them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from scipy import sparse

from pertcast.data.entries import GrowingArray
from pertcast.files.csc import row_bands
from pertcast.files.ranges import RangeFile
from pertcast.progress import Advance

__all__ = ["HVG_PREFIX", "StoredValues", "worth_a_copy", "write_hvg_values"]

HVG_PREFIX = "hvg_"
_BLOCK_VALUES = 1 << 20
_MOST_GENES = 0.5


class StoredValues:
    """Values of cells as they are stored, opened for reading.

    Parameters
    ----------
    folder
        Where ``indptr.npy``, ``indices.npy`` and ``data.npy`` are.
    num_genes
        Width of a cell.
    prefix
        What their names start with.

    Attributes
    ----------
    num_values
        Stored values of all cells.

    Raises
    ------
    OSError, ValueError, EOFError
        If a file is missing or damaged, or they do not fit each other.
    """

    def __init__(self, folder: Path, *, num_genes: int, prefix: str = "") -> None:
        self._num_genes = num_genes
        self._indptr = np.load(folder / f"{prefix}indptr.npy", allow_pickle=False)
        self._indices = RangeFile(folder / f"{prefix}indices.npy")
        self._data = RangeFile(folder / f"{prefix}data.npy")
        self.num_values = len(self._data)
        if len(self._indices) != self.num_values or int(self._indptr[-1]) != self.num_values:
            raise ValueError(f"{prefix}indptr, {prefix}indices and {prefix}data do not fit each other")

    def __len__(self) -> int:
        return len(self._indptr) - 1

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the values of rows (int64), CSR (len(rows), genes) of the stored type; only their bytes are read.

        Raises
        ------
        OSError
            If a file is shorter than it was when it was opened.
        """
        starts, stops = self._indptr[rows], self._indptr[rows + 1]
        indices = self._indices.gather(starts, stops).astype(np.int32)
        values = self._data.gather(starts, stops)
        indptr = np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64)
        return sparse.csr_matrix((values, indices, indptr), shape=(len(rows), self._num_genes), copy=False)


def worth_a_copy(num_hvgs: int, num_genes: int) -> bool:
    """Return whether the highly variable genes are few enough to lie apart from the others, too."""
    return 0 < num_hvgs <= _MOST_GENES * num_genes


def write_hvg_values(folder: Path, hvg: np.ndarray, *, num_genes: int, advance: Advance) -> None:
    """Write the values of some genes of all cells beside those of all genes, in one pass over these.

    Parameters
    ----------
    folder
        Where the files of all genes are.
    hvg
        Ascending positions of the genes; columns are positions in it.
    num_genes
        Width of a cell among all genes.
    advance
        Told how many cells are done.
    """
    indptr = np.load(folder / "indptr.npy")
    columns, values = (np.load(folder / name, mmap_mode="r") for name in ("indices.npy", "data.npy"))
    is_hvg, place = np.zeros(num_genes, dtype=bool), np.zeros(num_genes, dtype=columns.dtype)
    is_hvg[hvg], place[hvg] = True, np.arange(len(hvg))
    num_values = np.zeros(len(indptr) - 1, dtype=np.int64)
    out_columns = GrowingArray(folder / f"{HVG_PREFIX}indices.npy", columns.dtype)
    out_values = GrowingArray(folder / f"{HVG_PREFIX}data.npy", values.dtype)
    try:
        for start, stop in itertools.pairwise(row_bands(indptr, max_values=_BLOCK_VALUES)):
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
