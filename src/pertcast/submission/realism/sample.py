"""Samples of cells of a prediction and of real control cells: which rows, their values, and both on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.expression import Scale, ScaleEvidence, normalise_log1p
from pertcast.files.frames import near_misses
from pertcast.files.h5ad import H5adReader
from pertcast.progress import Progress
from pertcast.seasons import Season
from pertcast.stats.draws import generator

__all__ = [
    "Picked",
    "SampledCells",
    "columns_of",
    "common_total",
    "contexts_of",
    "halves_of",
    "labels_of",
    "pick_rows",
    "read_rows",
    "real_rows",
    "to_log1p",
    "totals_of",
]

_MOST_CELLS = 2000
_MOST_TARGETS = 20
_CELLS_OF_TARGET = 100
_SAME_TOTAL = 0.01


class SampledCells(NamedTuple):
    """Rows of one file: their values as stored, and the place in them of each row asked for."""

    values: sparse.csr_matrix
    scale: Scale
    place: NDArray[np.int64]

    def at(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return the values of some of these rows."""
        return self.values[self.place[rows]]


class Picked(NamedTuple):
    """Rows of a prediction's control cells, and of the cells of some targets."""

    null: NDArray[np.int64]
    targets: tuple[NDArray[np.int64], ...]

    @property
    def all_rows(self) -> tuple[NDArray[np.int64], ...]:
        """All rows, group by group."""
        return (self.null, *self.targets)


def labels_of(reader: H5adReader, column: str) -> NDArray[np.str_]:
    """Return the label of each cell, "" where it has none."""
    values = reader.obs(column)
    return np.asarray(np.append(np.asarray(values.categories, dtype=str), "")[values.codes])


def contexts_of(reader: H5adReader, rules: Season) -> NDArray[np.str_]:
    """Return the context of each cell, "" where the season has one."""
    if rules.context_column is None:
        return np.zeros(reader.num_cells, dtype="U1")
    return labels_of(reader, rules.context_column)


def real_rows(
    real: H5adReader, rules: Season, contexts: NDArray[np.str_], where: Mapping[str, str], notes: list[str]
) -> dict[str, NDArray[np.int64]]:
    """Return the rows of the real control cells of each context; `where` names labels that they must have."""
    keep = np.ones(real.num_cells, dtype=bool)
    for column, wanted in where.items():
        of_column = labels_of(real, column)
        if wanted not in of_column:
            there = sorted(set(of_column.tolist()))
            place, remedy = (
                f"{real.path}, obs[{column!r}]",
                f"there is {', '.join(near_misses(wanted, there) or there)}",
            )
            raise DataError(problems=[Problem(place, f"no cell has {wanted!r}", remedy)])
        keep &= of_column == wanted
    if rules.pert_column in real.obs_columns:
        keep &= labels_of(real, rules.pert_column) == rules.control_label
    if rules.context_column is not None and rules.context_column in real.obs_columns:
        of_cell = labels_of(real, rules.context_column)
    else:
        of_cell = None
        if rules.context_column is not None:
            notes.append(f"{real.path} has no column {rules.context_column!r}: all its cells stand for every context")
    found = {
        context: np.flatnonzero(keep if of_cell is None else keep & (of_cell == context))
        for context in np.unique(contexts).tolist()
    }
    few = [context for context, rows in found.items() if len(rows) < 4]
    if few:
        message = f"expected four real control cells or more, got {len(found[few[0]])}"
        place = f"{real.path}, context {few[0]!r}" if few[0] else str(real.path)
        remedy = f"give a file with {rules.control_label!r} cells in {rules.pert_column!r}, or of control cells alone"
        raise DataError(problems=[Problem(place, message, remedy)])
    return found


def pick_rows(labels: NDArray[np.str_], here: NDArray[np.bool_], rules: Season, seed: int, context: str) -> Picked:
    """Draw control cells and cells of some targets; what is drawn of a target does not depend on the others."""
    random = generator(seed, "realism", context)
    null = _some(np.flatnonzero(here & (labels == rules.control_label)), _MOST_CELLS, random)
    targets = np.array(sorted(set(labels[here].tolist()) - {rules.control_label}))
    chosen = np.sort(random.permutation(len(targets))[:_MOST_TARGETS])
    cells = [np.flatnonzero(here & (labels == targets[place])) for place in chosen]
    return Picked(null, tuple(_some(rows, _CELLS_OF_TARGET, random) for rows in cells if len(rows) > 1))


def _some(rows: NDArray[np.int64], most: int, random: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= most else np.sort(random.choice(rows, most, replace=False))


def halves_of(rows: NDArray[np.int64], seed: int, context: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return two random halves of some rows, not too many of each."""
    shuffled = generator(seed, "realism", "halves", context).permutation(rows)
    size = min(len(rows) // 2, _MOST_CELLS)
    return shuffled[:size], shuffled[size : 2 * size]


def columns_of(made: H5adReader, real: H5adReader) -> NDArray[np.int64] | None:
    """Return the column of each gene of the prediction in the real file, ``None`` where they are the same."""
    if made.genes == real.genes:
        return None
    place = {gene: column for column, gene in enumerate(real.genes)}
    lost = [gene for gene in made.genes if gene not in place]
    if lost:
        message = f"{len(lost):,} of the {len(made.genes):,} genes of the prediction are not there: {lost[0]!r} ..."
        raise DataError(problems=[Problem(f"{real.path}, var_names", message, "give cells with these genes")])
    return np.array([place[gene] for gene in made.genes], dtype=np.int64)


def read_rows(
    reader: H5adReader, rows: NDArray[np.int64], columns: NDArray[np.int64] | None, progress: Progress
) -> SampledCells:
    """Read some rows in one pass over the file."""
    wanted = np.zeros(reader.num_cells, dtype=bool)
    wanted[rows] = True
    evidence = ScaleEvidence(str(reader.path), genes=reader.genes)
    blocks = []
    with progress.task(f"read {reader.path.name}", reader.num_cells, "cells") as advance:
        for first, block in reader.chunks():
            mine = np.flatnonzero(wanted[first : first + block.shape[0]])
            if len(mine):
                part = block[mine]
                evidence.add_csr(part, first_cell=first)
                blocks.append((part if columns is None else part[:, columns]).astype(np.float32))
            advance(block.shape[0])
    return SampledCells(sparse.vstack(blocks, format="csr"), evidence.verdict(), np.cumsum(wanted) - 1)


def totals_of(values: sparse.csr_matrix, scale: Scale) -> NDArray[np.float64]:
    """Return the total of each cell; of log1p cells that before log1p."""
    linear = values if scale == "counts" else values.expm1()
    return np.asarray(linear.sum(axis=1, dtype=np.float64)).ravel()


def common_total(cells: SampledCells) -> float:
    """Return the median total of cells."""
    return float(np.median(totals_of(cells.values, cells.scale))) or 1.0


def to_log1p(values: sparse.csr_matrix, cells: SampledCells, target_sum: float) -> sparse.csr_matrix:
    """Return values normalised to a total; those of log1p cells are scaled together, where theirs is another."""
    if cells.scale == "counts":
        return normalise_log1p(values, totals_of(values, "counts"), target_sum)
    factor = target_sum / common_total(cells)
    if abs(factor - 1) <= _SAME_TOTAL:
        return values
    return (values.expm1() * factor).log1p().astype(np.float32)
