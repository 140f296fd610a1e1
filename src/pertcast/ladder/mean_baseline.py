"""The official baseline of season 2025: every target's cells are the mean over the training perturbations' means.

`cell-eval baseline` writes one constant cell, repeated, beside the training file's control cells. Here it is scored
without writing it. Targets with equally many cells are alike, and constant cells are made in bounded numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.files.resources import available_cpus
from pertcast.ladder.scored_side import PseudobulkStats, read_groups
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.stats.de import differential_expression
from pertcast.stats.groups import CellGroups, group_cells, group_means
from pertcast.stats.metrics import is_significant

_MAX_VALUES = 1 << 27


@dataclass(frozen=True)
class TrainingMean:
    """A request for the training-mean baseline."""

    cells: Path  # h5ad file of training cells, controls among them


def training_mean_side(
    training: TrainingMean, truth: PseudobulkStats, rules: Season, *, progress: Progress = SILENT
) -> PseudobulkStats:
    """Return the baseline's statistics for the targets of a truth, with as many cells each."""
    read = read_groups(training.cells, rules, progress=progress)
    means = group_means(read.groups)[0].astype(read.groups.values.dtype)
    return _constant_side(
        means.mean(axis=0),
        read.groups.select([read.control]),
        dataclasses.replace(truth, genes=read.genes, control_mean_log1p=means[read.control]),
        from_dense=read.from_dense,
        progress=progress,
    )


def constant_side(
    constant_log1p: NDArray[np.floating],
    controls_log1p: sparse.csr_matrix,
    truth: PseudobulkStats,
    *,
    progress: Progress = SILENT,
) -> PseudobulkStats:
    """Return the statistics of targets whose cells are all one cell, beside control cells."""
    control = group_cells(controls_log1p, np.zeros(controls_log1p.shape[0], dtype=np.int64))
    mean = group_means(control)[0][0].astype(control.values.dtype)
    beside = dataclasses.replace(truth, control_mean_log1p=mean)
    return _constant_side(constant_log1p, control, beside, from_dense=False, progress=progress)


def _constant_side(
    constant: NDArray[np.floating],
    control: CellGroups,
    beside: PseudobulkStats,
    *,
    from_dense: bool,
    progress: Progress,
) -> PseudobulkStats:
    """Return the statistics of a constant cell, with the targets and controls of `beside`."""
    sizes, place = np.unique(beside.num_cells, return_inverse=True)
    significant = np.zeros((len(sizes), len(constant)), dtype=bool)
    fold_change = np.zeros((len(sizes), len(constant)), dtype=np.float32)
    with progress.task("training-mean baseline", len(sizes), "sizes") as advance:
        for batch in _batches(sizes, int(np.count_nonzero(constant))):
            copies = _repeat(constant, sizes[batch])
            table = differential_expression(copies, control, from_dense=from_dense, threads=available_cpus())
            significant[batch], fold_change[batch] = is_significant(table.fdr), table.log2_fold_change
            advance(batch.stop - batch.start)
    return dataclasses.replace(
        beside,
        means_log1p=np.tile(constant, (len(beside.perts), 1)),
        significant=significant[place],
        log2_fold_change=fold_change[place],
    )


def _batches(sizes: NDArray[np.int64], num_expressed: int) -> Iterator[slice]:
    """Yield ranges of sizes whose constant cells have a bounded number of values."""
    start = 0
    while start < len(sizes):
        stop = start + 1
        while stop < len(sizes) and int(sizes[start : stop + 1].sum()) * num_expressed <= _MAX_VALUES:
            stop += 1
        yield slice(start, stop)
        start = stop


def _repeat(cell: NDArray[np.floating], sizes: NDArray[np.int64]) -> CellGroups:
    """Return groups of copies of one cell."""
    expressed = cell != 0
    values = np.concatenate([np.repeat(cell[expressed], size) for size in sizes])
    counts = np.where(expressed, sizes[:, None], 0)
    starts = np.zeros((len(sizes), len(cell) + 1), dtype=np.int64)
    np.cumsum(counts, axis=1, out=starts[:, 1:])
    starts += np.concatenate([[0], np.cumsum(counts.sum(axis=1))[:-1]])[:, None]
    return CellGroups(values, starts, sizes.astype(np.int64))
