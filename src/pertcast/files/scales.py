"""The two scales of expression, whole counts and log1p of normalised counts: detect, convert, never mix.

The rules, by cell (a row with any value other than 0) and then by file:

- NaN, infinity and negative values are on no scale.
- A cell with any fraction is *fractional*; a cell of whole numbers alone is *whole*. A whole cell with fewer than three
  values may be so by chance, and follows the others.
- Whole cells alone are ``counts``. If no value is above 1 (presence and absence) they are *ambiguous*:
  ``prepare.scale`` or the other files of the experiment decide.
- Fractional cells alone are ``log1p``, unless a value is 15 or more (log1p of three million), or no fraction is above
  0.001: cell-eval takes neither for log1p. Such values were normalised without log1p, corrected for ambient RNA, or
  are counts with rounding errors.
- Whole and fractional cells in one file are mixed, which is an error that names the rows of the smaller group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import sparse

from pertcast.errors import DataError, Problem

Scale = Literal["counts", "log1p"]

MAX_LOG1P = 15.0
MIN_WHOLE_VALUES = 3
# fractions up to here are whole numbers to cell-eval
FAINT = np.float32(1e-3)
_NUM_TRIED = 8
_NUM_EXAMPLES = 5
RECOUNT = "give raw counts, or log1p of normalised counts"


class ScaleEvidence:
    """Collect evidence on the scale of a file, block by block.

    >>> evidence = ScaleEvidence("a.h5ad")
    >>> evidence.add(np.array([[0, 3, 1, 7], [2, 0, 5, 1]]))
    >>> evidence.verdict()
    'counts'
    """

    def __init__(
        self, place: str = "values", *, genes: Sequence[str] = (), max_log1p: float = MAX_LOG1P, hint: str = ""
    ) -> None:
        self.place = place
        self.genes = genes
        self.max_log1p = max_log1p
        self.hint = hint
        self.only_faint = True
        self.num_whole = self.num_fractional = self.num_weak = self.num_empty = 0
        self.first_whole: list[int] = []
        self.first_fractional: list[int] = []
        self.max_value = 0.0
        self.max_place = ""

    def add(
        self,
        values: np.ndarray,
        *,
        first_cell: int = 0,
        cell_of_value: np.ndarray | None = None,
        gene_of_value: np.ndarray | None = None,
    ) -> None:
        """Add the values of whole cells: dense rows, or entries with the cell of each."""
        if values.ndim == 2:
            self.add_csr(sparse.csr_matrix(values), first_cell=first_cell)
            return
        cells = np.zeros(len(values), dtype=np.int64) if cell_of_value is None else cell_of_value
        genes = np.arange(len(values)) if gene_of_value is None else gene_of_value
        num_cells = int(cells.max()) + 1 if len(cells) else 0
        indptr = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=num_cells))])
        order = np.argsort(cells, kind="stable")
        self._tally(values[order], indptr, genes[order], first_cell)

    def add_csr(self, block: sparse.csr_matrix, *, first_cell: int = 0) -> None:
        """Add a block of whole cells."""
        self._tally(block.data, block.indptr, block.indices, first_cell)

    def _tally(self, values: np.ndarray, indptr: np.ndarray, genes: np.ndarray, first_cell: int) -> None:
        self._refuse_impossible(values, indptr, genes, first_cell)
        starts = indptr[:-1].astype(np.int64)
        filled = np.flatnonzero(np.diff(indptr))
        num_values = np.zeros(len(starts), dtype=np.int64)
        fractional = np.zeros(len(starts), dtype=bool)
        if len(filled):
            num_values[filled] = _count(values != 0, starts[filled])
            fractional[filled] = fractional_rows(values, starts[filled])
            self.only_faint = self.only_faint and (not fractional.any() or only_faint(values))
            top = int(values.argmax())
            if values[top] > self.max_value:
                self.max_value, self.max_place = float(values[top]), self._name(top, indptr, genes, first_cell)
        whole = ~fractional & (num_values >= MIN_WHOLE_VALUES)
        weak = ~fractional & ~whole & (num_values > 0)
        self.num_fractional += int(fractional.sum())
        self.num_whole += int(whole.sum())
        self.num_weak += int(weak.sum())
        self.num_empty += int((num_values == 0).sum())
        for first, found in ((self.first_whole, whole), (self.first_fractional, fractional)):
            rows = np.flatnonzero(found)[: _NUM_EXAMPLES - len(first)]
            first.extend(int(row) + first_cell for row in rows)

    def _refuse_impossible(self, values: np.ndarray, indptr: np.ndarray, genes: np.ndarray, first_cell: int) -> None:
        if not values.size or (values.min() >= 0 and np.isfinite(values.max())):
            return
        first = int(np.flatnonzero(~(np.isfinite(values) & (values >= 0)))[0])
        where = f"{self.place}, {self._name(first, indptr, genes, first_cell)}"
        message = f"expected a finite value of 0 or more, got {values[first]}"
        raise DataError(
            problems=[Problem(where, message, f"drop this cell; scaled (z-scored) data cannot be used{self.hint}")]
        )

    def _name(self, entry: int, indptr: np.ndarray, genes: np.ndarray, first_cell: int) -> str:
        cell = first_cell + int(np.searchsorted(indptr, entry, side="right")) - 1
        gene = int(genes[entry])
        return (
            f"cell {cell} (from 0), gene {self.genes[gene]!r}" if self.genes else f"cell {cell} (from 0), column {gene}"
        )

    @property
    def ambiguous(self) -> bool:
        """Whether the values fit both scales: all are 0 or 1, or there are none."""
        return not self.num_fractional and self.max_value <= 1

    def problem(self, asked: Literal["auto", "counts", "log1p"] = "auto") -> Problem | None:
        """Return what is wrong with the values alone, or as the requested scale; ``None`` if nothing."""
        problem = self._problem(asked)
        return None if problem is None else problem._replace(remedy=problem.remedy + self.hint)

    def _problem(self, asked: Literal["auto", "counts", "log1p"]) -> Problem | None:
        if self.num_fractional and self.only_faint:
            return Problem(
                f"{self.place}, rows {', '.join(map(str, self.first_fractional))}",
                f"no fraction is above {FAINT:g}: neither whole counts nor log1p",
                "round counts to whole numbers",
            )
        if self.num_whole and self.num_fractional:
            whole_is_fewer = self.num_whole <= self.num_fractional
            rows = self.first_whole if whole_is_fewer else self.first_fractional
            fewer = "whole counts" if whole_is_fewer else "values with fractions"
            number = min(self.num_whole, self.num_fractional)
            shown = ", ".join(map(str, rows)) + (" ..." if number > len(rows) else "")
            total = self.num_whole + self.num_fractional
            return Problem(
                f"{self.place}, rows {shown}",
                f"two scales are mixed: {number:,} of {total:,} cells hold {fewer}, the others do not",
                "bring every cell to one scale, counts or log1p",
            )
        if self.num_fractional and self.max_value >= self.max_log1p:
            return Problem(
                f"{self.place}, {self.max_place}",
                f"values have fractions and go up to {self.max_value:,.6g}: neither whole counts nor log1p",
                RECOUNT,
            )
        if asked == "auto" and self.ambiguous:
            what = "every value is 0 or 1" if self.max_value else "there is no value other than 0"
            return Problem(
                self.place,
                f"{what}: counts and log1p cannot be told apart",
                'set prepare.scale = "counts" or "log1p", or leave the file out',
            )
        if asked != "auto" and not self.ambiguous and asked != (found := self._found()):
            seen = "whole numbers" if found == "counts" else "fractions"
            return Problem(
                self.place,
                f"expected {asked} (prepare.scale), got {seen} up to {self.max_value:,.6g}",
                f'set prepare.scale = "{found}" or "auto"; or give another file',
            )
        return None

    def _found(self) -> Scale:
        return "log1p" if self.num_fractional else "counts"

    def verdict(self) -> Scale:
        """Return the scale."""
        if problem := self.problem():
            raise DataError(problems=[problem])
        return self._found()


def fractional_rows(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return which rows hold a fraction, bool; rows are given by their starts and are not empty."""
    if values.dtype.kind != "f":
        return np.zeros(len(starts), dtype=bool)
    # the first values of a row mostly tell
    last = np.append(starts[1:], len(values)) - 1
    some = values[np.minimum(starts[:, None] + np.arange(_NUM_TRIED), last[:, None])]
    found: np.ndarray = (some != np.rint(some)).any(axis=1)
    if found.all():
        return found
    broken = values != np.rint(values)
    return np.logical_or.reduceat(broken, starts) if broken.any() else found


def only_faint(values: np.ndarray) -> bool:
    """Return whether no value is more than 0.001 above a whole number."""
    return not bool((values.astype(np.float32, copy=False) % 1 > FAINT).any())


def _count(is_so: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the number of true values from each start to the next."""
    if is_so.all():
        return np.diff(starts, append=len(is_so))
    return np.add.reduceat(is_so, starts, dtype=np.int64)


def common_scale(evidence: Sequence[ScaleEvidence], *, asked: Literal["auto", "counts", "log1p"] = "auto") -> Scale:
    """Return the one scale of several files."""
    clear = [item for item in evidence if not item.ambiguous]
    judged = (
        clear
        if clear and all(item.problem(asked) is None and item.verdict() == "counts" for item in clear)
        else evidence
    )
    problems = [problem for item in judged if (problem := item.problem(asked))]
    if problems:
        raise DataError("the values of the data cannot be used" if len(problems) > 1 else "", problems=problems)
    if asked != "auto":
        return asked
    found = {item.place: item.verdict() for item in judged}
    if len(set(found.values())) > 1:
        hints = {item.place: item.hint for item in judged}
        remedy = "bring all files to one scale; raw counts are best"
        raise DataError(
            "the files of one experiment are on different scales",
            problems=[
                Problem(place, f"is on the scale {scale}", remedy + hints[place]) for place, scale in found.items()
            ],
        )
    return next(iter(found.values()))


def log1p_totals(log1p: sparse.csr_matrix) -> np.ndarray:
    """Return the totals of cells before log1p, float64."""
    return row_sums(np.expm1(log1p.data.astype(np.float64)), log1p.indptr)


def row_sums(values: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Return the sum of each row's values, float64."""
    sums, filled = np.zeros(len(indptr) - 1), np.flatnonzero(np.diff(indptr))
    if len(filled):
        sums[filled] = np.add.reduceat(values, indptr[filled], dtype=np.float64)
    return sums


def normalising_factors(totals: np.ndarray, target_sum: float) -> np.ndarray:
    """Return target_sum / total of each cell, float32; 0 for a cell whose total is 0."""
    totals = np.asarray(totals, dtype=np.float64)
    return np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0).astype(np.float32)


def normalise_log1p(counts: sparse.csr_matrix, totals: np.ndarray, target_sum: float) -> sparse.csr_matrix:
    """Return log1p(count * target_sum / total of the cell), float32; a cell whose total is 0 stays 0.

    >>> log1p = normalise_log1p(sparse.csr_matrix([[1, 3], [0, 0]]), np.array([4.0, 0.0]), 4.0)
    >>> np.expm1(log1p.toarray()).round(5).tolist()
    [[1.0, 3.0], [0.0, 0.0]]
    """
    values = counts.data.astype(np.float32)
    values *= np.repeat(normalising_factors(totals, target_sum), np.diff(counts.indptr))
    np.log1p(values, out=values)
    return sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape, copy=False)


_SAME_TOTAL = 0.01
_MAX_CHECKED_COUNT = 1000


def log_problem(cells: sparse.csr_matrix, place: str, base: float | None = None) -> Problem | None:
    """Return the evidence that values with fractions are not log1p of normalised counts, or ``None``."""
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
