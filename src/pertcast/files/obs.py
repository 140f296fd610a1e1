"""Read columns of obs and var in every form that AnnData has written, with bounds on declared sizes.

Invariants: a column is returned as strings. A missing value is code -1, never an invented label.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from pertcast.errors import DataError, Problem
from pertcast.files.labels import plain

MAX_RATIO = 2_000
"""Bytes that a byte of the file may stand for; deflate's own limit is 1,032."""
MAX_CHUNK_BYTES = 1 << 30
"""Bytes of one chunk, which HDF5 reads as a whole."""
_ALWAYS_BYTES = 1 << 26


def require_plausible(node: Any) -> None:
    """Refuse a dataset whose declared size its file cannot hold, or whose chunks are too large.

    >>> import io
    >>> with h5py.File(io.BytesIO(), "w") as file:
    ...     require_plausible(file.create_dataset("small", shape=(1000,), dtype="f4"))
    """
    if not isinstance(node, h5py.Dataset):
        raise TypeError(f"expected an array, got {type(node).__name__}")
    declared, file_bytes = int(node.size or 0) * node.dtype.itemsize, node.file.id.get_filesize()
    if declared > max(_ALWAYS_BYTES, MAX_RATIO * file_bytes):
        raise ValueError(f"it declares {int(node.size):,} values, more than a file of {file_bytes:,} bytes can hold")
    chunk_bytes = node.dtype.itemsize
    for length in node.chunks or ():
        chunk_bytes *= int(length)
    if node.chunks and chunk_bytes > MAX_CHUNK_BYTES:
        raise ValueError(f"chunks of {chunk_bytes:,} bytes; at most {MAX_CHUNK_BYTES:,} can be read")


# errors of h5py and NumPy on damaged or hostile files
_BROKEN = (OSError, LookupError, RuntimeError, AttributeError, TypeError, ValueError, ArithmeticError, MemoryError)
_REWRITE = "write it again with a current anndata: anndata.read_h5ad(path).write_h5ad(path)"


@contextmanager
def reading(path: Path, part: str) -> Iterator[None]:
    """Turn h5py's errors on a broken part of a file into one DataError that names it."""
    try:
        yield
    except _BROKEN as error:
        text = str(error).strip("'\"")
        problem = Problem(
            f"{path}, {part}", f"cannot be read ({text})", "the file is damaged or incomplete; copy it again"
        )
        raise DataError(problems=[problem]) from error


def near_misses(name: str, known: Sequence[str], *, num: int = 3) -> list[str]:
    """Return names that differ from `name` by case, punctuation or a few letters, nearest first.

    >>> near_misses("non-targeting", ["TP53", "non_targeting"])
    ['non_targeting']
    """
    same = [other for other in known if plain(other) == plain(name)]
    close = difflib.get_close_matches(name, known, n=num, cutoff=0.75) if len(known) <= 100_000 else []
    return list(dict.fromkeys(same + close))[:num]


def _index_name(group: Any, path: Path, table: str) -> str:
    name = group.attrs.get("_index", "_index")
    name = name.decode() if isinstance(name, bytes) else str(name)
    if name not in group and "index" in group and "_index" not in group.attrs:
        name = "index"
    if name not in group:
        raise DataError(
            problems=[Problem(f"{path}, {table}", f"its index {name!r} is not in the file", "write the file again")]
        )
    return name


def table(file: Any, path: Path, name: str) -> Any:
    """Return the group of ``obs`` or ``var``."""
    with reading(path, name):
        group = file.get(name)
    if group is None:
        raise DataError(problems=[Problem(str(path), f"no {name} in it: this is no AnnData file", "give a .h5ad file")])
    if not isinstance(group, h5py.Group):
        raise DataError(problems=[Problem(f"{path}, {name}", "written by an AnnData older than 0.7", _REWRITE)])
    return group


def column_names(file: Any, path: Path, name: str) -> tuple[str, ...]:
    """Return the columns of ``obs`` or ``var``, without the index."""
    group = table(file, path, name)
    with reading(path, name):
        ordered = [
            item.decode() if isinstance(item, bytes) else str(item) for item in group.attrs.get("column-order", [])
        ]
        index = _index_name(group, path, name)
        others = sorted(key for key in group if key not in (index, "__categories", *ordered))
        return (*(key for key in ordered if key in group), *others)


def index_length(file: Any, path: Path, name: str) -> int:
    """Return the number of rows of ``obs`` or ``var`` without reading their names."""
    group = table(file, path, name)
    with reading(path, f"{name} index"):
        node = group[_index_name(group, path, name)]
        if isinstance(node, h5py.Group):
            node = node["codes"] if "codes" in node else node["values"]
        return int(node.shape[0])


def read_index(file: Any, path: Path, name: str) -> np.ndarray:
    """Return the row names of ``obs`` or ``var`` as an array of str objects."""
    group = table(file, path, name)
    with reading(path, f"{name} index"):
        values = _strings(group[_index_name(group, path, name)])
        if isinstance(values, pd.Categorical):
            values = np.asarray(values, dtype=object)
        if values.ndim != 1:
            raise ValueError(f"{values.ndim} dimensions where one is expected")
        missing = np.flatnonzero(pd.isna(values))
    if len(missing):
        raise DataError(
            problems=[
                Problem(f"{path}, {name} index", f"row {missing[0]} has no name", "name every row, then write it again")
            ]
        )
    return values


def _strings(node: Any) -> np.ndarray | pd.Categorical:
    """Return a column as str objects (``None`` if missing), or as a Categorical if stored as one."""
    if isinstance(node, h5py.Group):
        kind = str(node.attrs.get("encoding-type", ""))
        if kind == "categorical":
            return _categorical(_whole(node["codes"]), node["categories"])
        values = _as_strings(node["values"])
        values[np.asarray(_whole(node["mask"]), dtype=bool)] = None
        return values
    if "categories" in node.attrs and isinstance(node.attrs["categories"], h5py.Reference):
        return _categorical(_whole(node), node.file[node.attrs["categories"]])
    return _as_strings(node)


def _whole(dataset: Any) -> np.ndarray:
    require_plausible(dataset)
    return np.asarray(dataset[()])


def _as_strings(dataset: Any) -> np.ndarray:
    require_plausible(dataset)
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return np.asarray(dataset.asstr()[()], dtype=object)
    raw = np.asarray(dataset[()])
    if raw.dtype.kind not in "biuf":
        raise TypeError(f"a column of type {raw.dtype}")
    values = raw.astype(str).astype(object)
    if raw.dtype.kind == "f":
        values[np.isnan(raw)] = None
    return values


def _categorical(codes: np.ndarray, categories: Any) -> pd.Categorical:
    labels = _strings(categories)
    labels = np.asarray(labels, dtype=object)
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" or (codes.size and (codes.min() < -1 or codes.max() >= len(labels))):
        raise ValueError(f"codes outside the {len(labels)} categories")
    return pd.Categorical.from_codes(codes.astype(np.int32), categories=pd.Index(labels, dtype=object))


def read_column(file: Any, path: Path, column: str, *, num_rows: int) -> pd.Categorical:
    """Return a column of obs as a Categorical of strings; missing values have code -1."""
    columns = column_names(file, path, "obs")
    if column not in columns:
        near = near_misses(column, columns)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            problems=[
                Problem(
                    f"{path}, obs",
                    f"expected a column {column!r}, got {', '.join(columns) or 'no columns'}",
                    f"{hint}name the right one in [columns] of the experiment file",
                )
            ]
        )
    with reading(path, f"obs[{column!r}]"):
        values = _strings(file["obs"][column])
        result = values if isinstance(values, pd.Categorical) else pd.Categorical(values)
        if len(result) != num_rows:
            raise ValueError(f"{len(result)} values for {num_rows} cells")
    return result


_HEAD_BYTES = 512
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!doctype html", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
    (b"\x1f\x8b", "compressed by gzip; decompress it with gunzip"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"\x89hdf\r\n", "an HDF5 file"),
    (b"pk\x03\x04", "a zip archive or an Excel workbook; save the table as CSV text"),
)


def wrong_kind(path: Path, *, zipped: bool = False) -> str | None:
    """Return what a file really is, and the remedy, from its first bytes; ``None`` if nothing is suspicious."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES).lstrip().lower()
    except OSError:
        return None
    kinds = _KINDS[:-1] if zipped else _KINDS
    return next((what for start, what in kinds if head.startswith(start)), None)
