"""Values of a prediction: number type, finite, not negative, one scale in all cells, within the season's sums and size.

The scales are told apart as in :mod:`pertcast.files.expression`: a cell of whole numbers alone is on the counts scale,
one with a fraction on the log1p scale, where no value is above 16; a cell with fewer than three values goes with the
others. Here nothing stops at the first bad value. Read once, in blocks; what is kept is a few numbers a cell.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.expression import MAX_LOG1P
from pertcast.files.h5ad import H5adReader
from pertcast.progress import Progress
from pertcast.seasons import Season
from pertcast.submission.check.report import CheckItem, Findings, counted, problems_of

__all__ = ["check_values"]

_BLOCK_VALUES = 1 << 22
_NUM_ROWS_NAMED = 5
_MIN_WHOLE_VALUES = 3
_ONE_SCALE = "put all cells on one scale; copied control cells are normalised as the predicted ones are"


class _Scan:
    """What is known of each cell, and the first and the number of the values that no scale allows."""

    def __init__(self, num_cells: int) -> None:
        self.fractional = np.zeros(num_cells, dtype=bool)
        self.num_values = np.zeros(num_cells, dtype=np.int64)
        self.largest = np.zeros(num_cells, dtype=np.float64)
        self.sums = np.zeros(num_cells, dtype=np.float64)
        self.bad: dict[str, tuple[int, int, int, float]] = {}

    def add(self, first: int, block: sparse.csr_matrix) -> None:
        values, indptr = block.data, block.indptr
        rows = np.arange(first, first + block.shape[0])
        filled = np.diff(indptr) > 0
        kinds = {"NaN": np.isnan(values), "infinite": np.isinf(values), "negative": values < 0}
        clean = values
        for kind, wrong in kinds.items():
            if wrong.any():
                self._note_bad(kind, first, block, wrong)
                clean = np.where(wrong, np.zeros(1, dtype=values.dtype), clean)
        if filled.any():
            # reduceat needs starts of rows that hold something; rows without entries keep their zeros.
            starts, into = indptr[:-1][filled], rows[filled]
            self.fractional[into] = np.logical_or.reduceat(clean != np.rint(clean), starts)
            self.largest[into] = np.maximum.reduceat(clean, starts)
            self.sums[into] = np.add.reduceat(clean.astype(np.float64, copy=False), starts)
            self.num_values[into] = np.add.reduceat(clean != 0, starts, dtype=np.int64)

    def _note_bad(self, kind: str, first: int, block: sparse.csr_matrix, wrong: NDArray[np.bool_]) -> None:
        position = int(np.flatnonzero(wrong)[0])
        row = int(np.searchsorted(block.indptr, position, side="right")) - 1
        new = (0, first + row, int(block.indices[position]), float(block.data[position]))
        number, *place = self.bad.get(kind, new)
        self.bad[kind] = (number + int(wrong.sum()), *place)  # type: ignore[assignment]


def _rows_text(rows: NDArray[np.int64]) -> str:
    shown = ", ".join(str(row) for row in rows[:_NUM_ROWS_NAMED])
    return f"rows {shown}" + (", ..." if len(rows) > _NUM_ROWS_NAMED else "") if len(rows) > 1 else f"row {shown}"


def check_values(reader: H5adReader, season: Season, progress: Progress) -> Findings:
    """Read all values once and return what breaks the season's rules."""
    path = reader.path
    problems = _size_problems(reader, season)
    facts: dict[str, int | float | str | None] = {"dtype": str(reader.dtype), "stored_values": reader.num_stored}
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
    scale, scale_problems = _scale(scan, season, path)
    problems += scale_problems
    zeros = np.flatnonzero(scan.num_values == 0)
    notes = []
    if len(zeros) and len(zeros) < reader.num_cells:
        notes.append(f"no value above 0 in {counted(len(zeros), 'cell')} ({_rows_text(zeros)})")
    facts |= {
        "scale": scale,
        "max_value": float(scan.largest.max(initial=0.0)),
        "max_cell_sum": float(scan.sums.max(initial=0.0)),
        "median_cell_sum": float(np.median(scan.sums)) if reader.num_cells else None,
        "zero_cells": len(zeros),
    }
    words = {"log1p": "all log1p-normalised", "counts": "all whole counts", "mixed": "two scales"}
    evidence = f"{reader.dtype}, {words.get(scale or '', 'no value above 0')}, largest value {facts['max_value']:.6g}"
    evidence += "".join(", " + counted(number, f"{kind} value") for kind, (number, *_) in scan.bad.items())
    return Findings(
        tuple(problems), (CheckItem(_question(season), ok=not problems, evidence=evidence),), facts, tuple(notes)
    )


def _wants_float32(season: Season) -> bool:
    # A season that takes log1p takes float32 alone; whole counts may stand in any number type.
    return "log1p" in season.scales


def _question(season: Season) -> str:
    return "float32 on one scale" if _wants_float32(season) else "whole counts"


def _size_problems(reader: H5adReader, season: Season) -> list[Problem]:
    problems = []
    if _wants_float32(season) and reader.dtype != np.float32:
        message = f"expected float32, got {reader.dtype}"
        problems.append(Problem(f"{reader.path}, X", message, "convert it: adata.X = adata.X.astype('float32')"))
    if season.max_stored_values is not None and reader.num_stored > season.max_stored_values:
        message = f"expected at most {season.max_stored_values:,} stored values, got {reader.num_stored:,}"
        problems.append(Problem(f"{reader.path}, X", message, "drop explicit zeros: adata.X.eliminate_zeros()"))
    return problems


def _scale(scan: _Scan, season: Season, path: Path) -> tuple[str | None, list[Problem]]:
    place = f"{path}, X"
    fractional = np.flatnonzero(scan.fractional)
    few_values = _MIN_WHOLE_VALUES if len(fractional) else 1
    whole = np.flatnonzero(~scan.fractional & (scan.num_values >= few_values))
    if not len(whole) and not len(fractional):
        return None, [Problem(place, "no value is above 0 in any cell", "generate the cells again")]
    if season.scales == ("counts",) and len(fractional):
        message = (
            f"expected whole counts, got fractions in {counted(len(fractional), 'cell')} ({_rows_text(fractional)})"
        )
        remedy = f"season {season.name} takes counts, not normalised values"
        return "mixed" if len(whole) else "log1p", [Problem(place, message, remedy)]
    if len(whole) and len(fractional):
        few, what = (whole, "whole counts") if len(whole) <= len(fractional) else (fractional, "log1p")
        message = f"two scales: whole counts in {counted(len(whole), 'cell')}, log1p in {len(fractional):,}"
        return "mixed", [Problem(place, f"{message}; {what} in {_rows_text(few)}", _ONE_SCALE)]
    scale = "counts" if len(whole) else "log1p"
    problems = []
    if scale not in season.scales:
        problems.append(Problem(place, f"expected {' or '.join(season.scales)}, got {scale}", "convert the values"))
    high = np.flatnonzero(scan.largest > MAX_LOG1P)
    if scale == "log1p" and len(high):
        message = (
            f"values above {MAX_LOG1P:g} that are no counts in {counted(len(high), 'cell')} ({_rows_text(high)}), "
            f"up to {scan.largest.max():.6g}: no log1p-normalised value is as high"
        )
        problems.append(Problem(place, message, "take log1p of the normalised values, in all cells"))
    over = np.flatnonzero(scan.sums > season.max_cell_sum) if season.max_cell_sum is not None else high[:0]
    if scale == "counts" and len(over):
        most = f"{scan.sums.max():,.0f} in {counted(len(over), 'cell')} ({_rows_text(over)})"
        message = f"expected at most {season.max_cell_sum:,} counts a cell, got up to {most}"
        problems.append(Problem(place, message, "scale these cells down to whole counts"))
    return scale, problems
