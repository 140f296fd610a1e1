"""Reads and writes AnnData files in bounded memory: row blocks in, row blocks out.

Invariants: a block is CSR with sorted column indices and no duplicates, in the file's own number type; a broken file
is a DataError, never a crash or a wrong value; the same rows appended give the same bytes whatever their blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.bounds import require_plausible
from pertcast.files.csr_writer import CsrWriter
from pertcast.files.frames import column_names, index_length, read_column, read_index, reading
from pertcast.files.matrix import DAMAGED, Layout, Matrix
from pertcast.files.wrong_kind import wrong_kind

__all__ = ["CsrWriter", "H5adReader", "open_h5ad"]


@contextmanager
def open_h5ad(path: Path, *, layer: str | None = None) -> Iterator[H5adReader]:
    """Open a .h5ad or .h5 file in AnnData layout for reading: X, ``layers[layer]``, or raw.X where it is "raw".

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
    layers
        Other matrices that can be read in place of X; "raw" is raw.X.
    in_order
        Whether the rows read so far lay in the file with their column indices sorted.
    """

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
        """Whether the rows read so far lay in the file with their column indices sorted."""
        return self._matrix.in_order

    def close(self) -> None:
        """Remove temporary files; :func:`open_h5ad` calls it."""
        self._matrix.close()

    def _broken(self, part: str, message: str) -> None:
        raise DataError(problems=[Problem(f"{self.path}, {part}", message, DAMAGED)])

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
        return read_index(self._file, self.path, "obs")

    def log_base(self) -> float | None:
        """Return the base of the logarithm that scanpy recorded in ``uns["log1p"]``, or ``None``."""
        node = self._file.get("uns/log1p/base")
        if not isinstance(node, h5py.Dataset) or node.shape != () or node.dtype.kind not in "iuf":
            return None
        base = float(node[()])
        return base if base > 1 else None

    def chunks(self, *, max_values: int = 1 << 24) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield ``(first row, block)`` of consecutive rows; see :meth:`pertcast.files.matrix.Matrix.chunks`."""
        return self._matrix.chunks(max_values=max_values)

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
            require_plausible(node)
            return np.asarray(node[start:stop], dtype=np.float32)
