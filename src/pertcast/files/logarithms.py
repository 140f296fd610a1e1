"""Detect values that are on another logarithm than log1p, or on none, from what they undo to."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from pertcast.errors import Problem
from pertcast.files.expression import FAINT, MAX_LOG1P, RECOUNT, fractional_rows

__all__ = ["log_problem"]

_SAME_TOTAL = 0.01
_MAX_CHECKED_COUNT = 1000


def log_problem(cells: sparse.csr_matrix, place: str, base: float | None = None) -> Problem | None:
    """Return what shows that values with fractions are not log1p of normalised counts; ``None`` without clear evidence.

    Parameters
    ----------
    cells
        Some cells of the file, as they are stored.
    place
        The file.
    base
        The base of the logarithm that the file states; ``None`` where it states none.
    """
    filled = np.flatnonzero(np.diff(cells.indptr))
    if not len(filled):
        return None
    cells = cells[filled[fractional_rows(cells.data, cells.indptr[filled].astype(np.int64))]]
    values, starts = cells.data.astype(np.float64), cells.indptr[:-1].astype(np.int64)
    if len(starts) < 2 or not (np.isfinite(values).all() and values.min() >= 0):
        return None
    stated = np.e if base is None else base
    could_be_log = values.max() < MAX_LOG1P
    undone = (
        {"not logged": values}
        if not could_be_log
        else {
            "log1p": np.expm1(values * np.log(stated)),
            "log2(x + 1)": np.exp2(values) - 1,
            "log10(x + 1)": np.power(10.0, values) - 1,
            "natural log1p": np.expm1(values),
            "not logged": values,
        }
    )
    if could_be_log and values.max() < np.log(MAX_LOG1P):
        undone["log1p taken twice"] = np.expm1(np.expm1(values))
    same = [name for name, counts in undone.items() if _is_one_total(np.add.reduceat(counts, starts))]
    says = "" if base is None else f" (uns['log1p']['base'] is {base:g})"
    if same and "log1p" not in same:
        found = same[0]
        remedies = {
            "log2(x + 1)": "write adata.uns['log1p'] = {'base': 2}, and they are converted; or give raw counts",
            "log10(x + 1)": "write adata.uns['log1p'] = {'base': 10}, and they are converted; or give raw counts",
            "natural log1p": "remove 'base' from adata.uns['log1p'], or give raw counts",
            "not logged": "take log1p of them, or give raw counts",
        }
        what = f"values are {found}{says}: undone so, every cell has the same total"
        return Problem(place, what, remedies.get(found, RECOUNT))
    if same:
        return None
    for name, counts in undone.items():
        small = counts < _MAX_CHECKED_COUNT
        if name != "not logged" and (np.abs(counts - np.rint(counts)) < FAINT)[small].all() and small.any():
            what = f"values are {name} of whole counts that were never normalised: undone, all are whole numbers"
            return Problem(place, what, "give the counts themselves")
    return None


def _is_one_total(totals: np.ndarray) -> bool:
    middle = float(np.median(totals))
    return bool(np.isfinite(totals).all() and np.abs(totals - middle).max() <= _SAME_TOTAL * middle)
