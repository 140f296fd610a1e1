"""Read feature files (``.pt`` dict, ``.npz``, ``.parquet``, ``.csv``) as name → vector, without running code.

Every name and vector is checked, and all problems are reported at once.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from pertcast.errors import READ_ERRORS, DataError, Problem
from pertcast.files.obs import wrong_kind

if TYPE_CHECKING:
    from torch import Tensor


Vector = NDArray[Any]
_SHOWN = 8


def read_vectors(path: Path) -> dict[str, Vector]:
    """Return name → vector, all of one width, as they are in the file."""
    readers: dict[str, Callable[[Path], Iterable[tuple[Any, Any]]]] = {
        ".pt": _read_torch,
        ".npz": _read_npz,
        ".parquet": _read_table,
        ".csv": _read_table,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected a .pt, .npz, .parquet or .csv file; convert it to one of these")
    if not path.is_file():
        raise DataError(f"{path}: no such file; correct features.path")
    zipped = path.suffix.lower() in (".pt", ".npz")
    if what := wrong_kind(path, zipped=zipped):
        raise DataError(f"{path}: it is {what}")
    pairs = list(reader(path))
    problems = [*_name_problems(path, [name for name, _ in pairs])]
    vectors = {str(name): _as_vector(value) for name, value in pairs}
    problems += _vector_problems(path, vectors)
    if problems:
        raise DataError(f"{path}: {len(problems)} problem(s) in the features", problems=problems)
    return {name: vector for name, vector in vectors.items() if vector is not None}


def _unreadable(path: Path, error: Exception, expected: str) -> DataError:
    reason = str(error).strip().splitlines()
    return DataError(
        f"{path}: expected {expected}, and it cannot be read as that ({reason[0][:200] if reason else error!r}); "
        "write the file again"
    )


def _read_torch(path: Path) -> Iterable[tuple[Any, Any]]:
    import torch

    expected = "a torch file with a dict of name → tensor, without other Python objects"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own advice is to load it without protection
        raise DataError(f"{path}: expected {expected}, got other objects; save a dict of plain tensors") from None
    except READ_ERRORS as error:
        raise _unreadable(path, error, expected) from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected {expected}, got a {type(content).__name__}; save a dict")
    for name, value in content.items():
        yield name, _as_array(value) if isinstance(value, torch.Tensor) else value


def _as_array(tensor: Tensor) -> Any:
    """Return a tensor as an array; ``None``, which the caller refuses by its name, if it has no plain values."""
    import torch

    try:
        value = tensor.detach().to_dense().resolve_conj().resolve_neg()
        if value.is_quantized:
            value = value.dequantize()
        half = value.is_floating_point() and value.dtype not in (torch.float32, torch.float64, torch.float16)
        return (value.float() if half else value).numpy()
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _read_npz(path: Path) -> Iterable[tuple[Any, Any]]:
    expected = "a NumPy archive with `gene` and `embedding`, or an array for each name"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except READ_ERRORS as error:
        raise _unreadable(path, error, expected) from None
    if "gene" not in arrays or "embedding" not in arrays:
        return arrays.items()
    genes, matrix = arrays["gene"], arrays["embedding"]
    if genes.ndim != 1 or matrix.ndim != 2 or len(genes) != len(matrix):
        raise DataError(
            f"{path}: expected `gene` (N) and `embedding` (N x F), got {genes.shape} and {matrix.shape}; "
            "write one row of `embedding` for each gene"
        )
    return zip(genes.tolist(), matrix, strict=True)


def _read_table(path: Path) -> Iterable[tuple[Any, Any]]:
    expected = "a table whose first column is the name and the others are numbers"
    try:
        table = _read_csv(path) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    except (ValueError, pd.errors.ParserError, pa.ArrowException, OSError) as error:
        raise _unreadable(path, error, expected) from None
    if path.suffix.lower() == ".csv" and not isinstance(table.index, pd.RangeIndex):
        raise DataError(f"{path}: rows have more fields than the header names; give every column a name")
    if not pd.api.types.is_numeric_dtype(table.index.dtype):
        table = table.reset_index()
    if table.shape[1] < 2:
        raise DataError(f"{path}: expected {expected}, got {table.shape[1]} column(s); write a column for each value")
    if not len(table):
        return []
    values = table.iloc[:, 1:]
    wrong = [str(name) for name, dtype in values.dtypes.items() if not pd.api.types.is_numeric_dtype(dtype)]
    if wrong:
        problems = []
        for name in wrong:
            rows = table.iloc[:, 0][pd.to_numeric(table[name], errors="coerce").isna()]
            problems.append(Problem(f"column {name!r}", f"no number for {_listed(rows.tolist())}", "write numbers"))
        raise DataError(f"{path}: {len(wrong)} column(s) that are not numbers", problems=problems)
    return zip(table.iloc[:, 0].tolist(), values.to_numpy(), strict=True)


def _read_csv(path: Path) -> pd.DataFrame:
    # the gene symbol NA and its like are names here, not gaps
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        header = stream.readline()
    separator = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    return pd.read_csv(path, sep=separator, dtype={0: str}, keep_default_na=False, na_values=[""], low_memory=False)


def _as_vector(value: Any) -> Vector | None:
    """Return a vector of numbers, or ``None``."""
    try:
        vector = np.asarray(value)
    except ValueError:
        return None
    return vector if vector.ndim == 1 and vector.dtype.kind in "fiu" else None


def _name_problems(path: Path, names: Sequence[Any]) -> Iterable[Problem]:
    if not names:
        yield Problem(str(path), "it has no feature", "give a file with one vector for each target")
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong:
        yield Problem(
            str(path), f"{len(wrong)} name(s) are no text: {_listed(wrong)}", "name each vector by its target"
        )
    twice = [name for name, count in Counter(map(str, names)).items() if count > 1]
    if twice:
        yield Problem(str(path), f"{len(twice)} name(s) occur more than once: {_listed(twice)}", "keep one row of each")


def _vector_problems(path: Path, vectors: dict[str, Vector | None]) -> Iterable[Problem]:
    wrong = [name for name, vector in vectors.items() if vector is None]
    if wrong:
        yield Problem(
            str(path),
            f"{len(wrong)} name(s) have no vector of numbers: {_listed(wrong)}",
            "give one-dimensional numbers",
        )
    good = {name: vector for name, vector in vectors.items() if vector is not None}
    widths = Counter(len(vector) for vector in good.values())
    if len(widths) > 1 or 0 in widths:
        usual = widths.most_common(1)[0][0]
        odd = [f"{name} ({len(vector)})" for name, vector in good.items() if len(vector) != usual or usual == 0]
        yield Problem(
            str(path),
            f"expected vectors of one width, {usual} as most have, got {len(odd)} other(s): {_listed(odd)}",
            "give every target a vector of the same width",
        )
    broken = [name for name, vector in good.items() if not np.isfinite(vector).all()]
    if broken:
        yield Problem(
            str(path),
            f"{len(broken)} vector(s) with NaN or infinite values: {_listed(broken)}",
            "remove or correct them",
        )


def _listed(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(str(name) for name in names[:_SHOWN]) + more
