"""Check the values of a prediction: number type, finite, not negative, one scale, and the season's limits.

Scales are distinguished as in :mod:`pertcast.files.scales`: a cell of whole numbers is on the counts scale, one with a
fraction on the log1p scale, whose values are below the season's limit. A cell with fewer than three values follows the
others. The check does not stop at the first bad value. It reads once, in blocks, and keeps a few numbers for each cell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.h5ad import H5adReader
from pertcast.files.scales import FAINT, MIN_WHOLE_VALUES, fractional_rows, only_faint
from pertcast.progress import Progress
from pertcast.seasons import Season
from pertcast.submission.check.report import CheckItem, Fact, Findings, counted, problems_of

# blocks that lie in a processor's cache are checked several times as fast as larger ones
_BLOCK_VALUES = 1 << 18
_EXACT = 1 << 24
_NUM_ROWS_NAMED = 5
_CELLS_UNDONE = 16
_LARGEST_LOG1P = 30.0
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_ONE_SCALE = "put all cells on one scale; copied control cells are normalised as the predicted ones are"


class _Scan:
    """What is known of each cell, and the first and the number of the invalid values."""

    def __init__(self, num_cells: int) -> None:
        self.fractional = np.zeros(num_cells, dtype=bool)
        self.num_values = np.zeros(num_cells, dtype=np.int64)
        self.largest = np.zeros(num_cells, dtype=np.float64)
        self.sums = np.zeros(num_cells, dtype=np.float64)
        self.totals = np.full(num_cells, np.nan)
        self.bad: dict[str, tuple[int, int, int, float]] = {}
        self.only_faint = True

    def add(self, first: int, block: sparse.csr_matrix) -> None:
        values, indptr = block.data, block.indptr
        if not len(values):
            return
        least, most = values.min(), values.max()
        if not (least >= 0 and most <= _MAX_FLOAT32):
            values = self._clean(first, block)
            least = 0
        # reduceat needs starts of rows that hold something; rows without entries keep their zeros.
        filled = np.diff(indptr) > 0
        starts, into = indptr[:-1][filled].astype(np.int64), np.flatnonzero(filled) + first
        lengths = np.diff(np.append(starts, len(values)))
        self.fractional[into] = fractional_rows(values, starts)
        if self.only_faint and self.fractional[into].any():
            self.only_faint = only_faint(values)
        self.largest[into] = np.maximum.reduceat(values, starts)
        # float32 sums of fractions are near enough, and those of whole numbers below 2**24 are exact
        exact = values.dtype == np.float32 and float(self.largest[into].max()) * int(lengths.max()) < _EXACT
        self.sums[into] = np.add.reduceat(values, starts, dtype=np.float32 if exact else np.float64)
        # of log1p values only some cells are undone, since that takes time; medians are as good
        fractional = self.fractional[into]
        self.totals[into] = np.where(fractional, np.nan, self.sums[into])
        rows = np.flatnonzero(fractional)
        for row in rows[:: max(1, len(rows) // _CELLS_UNDONE)]:
            cell = values[starts[row] : starts[row] + lengths[row]]
            self.totals[into[row]] = np.expm1(np.minimum(cell, _LARGEST_LOG1P), dtype=np.float64).sum()
        self.num_values[into] = lengths if least > 0 else np.add.reduceat(values != 0, starts, dtype=np.int64)

    def _clean(self, first: int, block: sparse.csr_matrix) -> NDArray[Any]:
        """Record the invalid values, and return all values with zeros in their places."""
        values: NDArray[Any] = block.data
        clean = values
        # float32, in which values are packed, makes what it cannot hold infinite
        infinite = np.abs(values) > _MAX_FLOAT32
        for kind, wrong in {"NaN": np.isnan(values), "infinite": infinite, "negative": values < 0}.items():
            if wrong.any():
                position = int(np.flatnonzero(wrong)[0])
                row = int(np.searchsorted(block.indptr, position, side="right")) - 1
                new = (0, first + row, int(block.indices[position]), float(block.data[position]))
                number, *place = self.bad.get(kind, new)
                self.bad[kind] = (number + int(wrong.sum()), *place)  # type: ignore[assignment]
                clean = np.where(wrong, np.zeros(1, dtype=values.dtype), clean)
        return clean


def _rows_text(rows: NDArray[np.int64]) -> str:
    shown = ", ".join(str(row) for row in rows[:_NUM_ROWS_NAMED])
    return f"rows {shown}" + (", ..." if len(rows) > _NUM_ROWS_NAMED else "") if len(rows) > 1 else f"row {shown}"


def check_values(reader: H5adReader, season: Season, progress: Progress) -> Findings:
    """Read all values once and return the broken rules."""
    path = reader.path
    problems: list[Problem] = []
    facts: dict[str, Fact] = {"dtype": str(reader.dtype)}
    scan = _Scan(reader.num_cells)
    try:
        with progress.task("check", reader.num_cells, "cells") as advance:
            for first, block in reader.chunks(max_values=_BLOCK_VALUES):
                scan.add(first, block)
                advance(block.shape[0])
    except DataError as error:
        broken = problems_of(error, str(path))
        item = CheckItem(_question(season), ok=False, evidence="X cannot be read to its end")
        return Findings((*problems, *broken), (item,), facts)
    for kind, (number, row, gene, value) in scan.bad.items():
        place = f"{path}, X, row {row}, gene {reader.genes[gene]!r}"
        message = f"{counted(number, kind + ' value')}, the first {value:g}"
        problems.append(Problem(place, message, "every value must be finite and at least 0; generate the cells again"))
    # A dense matrix is packed as a sparse one, without its zeros.
    num_stored = int(scan.num_values.sum()) if reader.layout == "dense" else reader.num_stored
    problems += _size_problems(num_stored, season, path)
    scale, scale_problems = _scale(scan, season, path)
    problems += scale_problems
    zeros = np.flatnonzero(scan.num_values == 0)
    notes = []
    if len(zeros) and len(zeros) < reader.num_cells:
        notes.append(f"no value above 0 in {counted(len(zeros), 'cell')} ({_rows_text(zeros)})")
    facts |= {
        "stored_values": num_stored,
        "scale": scale,
        "max_value": float(scan.largest.max(initial=0.0)),
        "max_cell_sum": float(scan.sums.max(initial=0.0)),
        "median_cell_sum": float(np.median(scan.sums)) if reader.num_cells else None,
        "zero_cells": len(zeros),
        "nonzero_values": int(scan.num_values.sum()),
    }
    words = {"log1p": "all log1p-normalised", "counts": "all whole counts", "mixed": "two scales"}
    evidence = f"{reader.dtype}, {words.get(scale or '', 'no value above 0')}, largest value {facts['max_value']:.6g}"
    evidence += "".join(", " + counted(number, f"{kind} value") for kind, (number, *_) in scan.bad.items())
    item = CheckItem(_question(season), ok=not problems, evidence=evidence)
    return Findings(tuple(problems), (item,), facts, tuple(notes), zero_rows=zeros, totals=scan.totals)


def _question(season: Season) -> str:
    return "values on one scale" if "log1p" in season.scales else "whole counts"


def _size_problems(num_stored: int, season: Season, path: Path) -> list[Problem]:
    if season.max_stored_values is None or num_stored <= season.max_stored_values:
        return []
    message = f"expected at most {season.max_stored_values:,} stored values, got {num_stored:,}"
    return [Problem(f"{path}, X", message, "drop explicit zeros: adata.X.eliminate_zeros()")]


def _scale(scan: _Scan, season: Season, path: Path) -> tuple[str | None, list[Problem]]:
    place = f"{path}, X"
    fractional = np.flatnonzero(scan.fractional)
    few_values = MIN_WHOLE_VALUES if len(fractional) else 1
    whole = np.flatnonzero(~scan.fractional & (scan.num_values >= few_values))
    if not len(whole) and not len(fractional):
        return None, [Problem(place, "no value is above 0 in any cell", "generate the cells again")]
    if season.scales == ("counts",) and len(fractional):
        message = (
            f"expected whole counts, got fractions in {counted(len(fractional), 'cell')} ({_rows_text(fractional)})"
        )
        remedy = f"season {season.name} takes counts, not normalised values"
        return "mixed" if len(whole) else "log1p", [Problem(place, message, remedy)]
    if len(fractional) and scan.only_faint:
        message = f"no fraction above {FAINT:g} in any cell, the first in {_rows_text(fractional[:1])}"
        remedy = "round counts to whole numbers, or generate the cells again: cell-eval takes such values for counts"
        return "mixed" if len(whole) else "log1p", [Problem(place, f"{message}: neither counts nor log1p", remedy)]
    if len(whole) and len(fractional):
        few, what = (whole, "whole counts") if len(whole) <= len(fractional) else (fractional, "log1p")
        message = f"two scales: whole counts in {counted(len(whole), 'cell')}, log1p in {len(fractional):,}"
        return "mixed", [Problem(place, f"{message}; {what} in {_rows_text(few)}", _ONE_SCALE)]
    scale = "counts" if len(whole) else "log1p"
    problems = []
    if scale not in season.scales:
        problems.append(Problem(place, f"expected {' or '.join(season.scales)}, got {scale}", "convert the values"))
    limit = season.max_log1p if season.max_log1p is not None else np.inf
    high = np.flatnonzero(scan.largest >= limit)
    if scale == "log1p" and len(high):
        message = (
            f"values of {limit:g} or more that are no counts in {counted(len(high), 'cell')} ({_rows_text(high)}), "
            f"up to {scan.largest.max():.6g}: no log1p-normalised value is as high"
        )
        problems.append(Problem(place, message, "take log1p of the normalised values, in all cells"))
    over = np.flatnonzero(scan.sums > season.max_cell_sum) if season.max_cell_sum is not None else high[:0]
    if scale == "counts" and len(over):
        most = f"{scan.sums.max():,.0f} in {counted(len(over), 'cell')} ({_rows_text(over)})"
        message = f"expected at most {season.max_cell_sum:,} counts a cell, got up to {most}"
        problems.append(Problem(place, message, "scale these cells down to whole counts"))
    return scale, problems
