"""Move control cells by the predicted mean effect, in log1p.

Legend of shapes: n cells, G genes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertcast.stats.groups import compiled

SEEN_OFTEN = 0.5
"""Zeros stay where fewer than this share of the control cells show a gene."""
MOST_SCALED = 2.0
"""A log1p value is scaled no further: beyond it a rise means that more cells show the gene, not that they show more."""


def shift(
    donors_log1p: NDArray[np.float32], mean_log1p: NDArray[np.floating], *, spread: float = 1.0
) -> NDArray[np.float32]:
    """Return the predicted mean plus each control cell's residual, clipped at 0.

    >>> shift(np.array([[0.0], [2.0]], dtype=np.float32), np.array([0.5])).tolist()
    [[0.0], [1.5]]
    """
    return _moved(donors_log1p, mean_log1p, np.full(donors_log1p.shape[1], np.nan), spread)


def shift_sparing_zeros(
    donors_log1p: NDArray[np.float32], mean_log1p: NDArray[np.floating], *, spread: float = 1.0
) -> NDArray[np.float32]:
    """Return the same, but keep zeros of rarely seen genes and scale their other values.

    >>> donors = np.array([[0.0], [0.0], [2.0]], dtype=np.float32)
    >>> shift_sparing_zeros(donors, np.array([1.0])).tolist()
    [[0.0], [0.0], [3.0]]
    """
    wanted = np.asarray(mean_log1p, dtype=np.float64)
    rare = np.count_nonzero(donors_log1p, axis=0) < SEEN_OFTEN * len(donors_log1p)
    centre = donors_log1p.mean(axis=0, dtype=np.float64)
    factor = np.divide(wanted, centre, out=np.zeros_like(centre), where=centre > 0)
    moved = _moved(donors_log1p, wanted, np.where(rare, np.minimum(factor, MOST_SCALED), np.nan), spread)
    _show_in_more_cells(moved, np.flatnonzero(rare & (factor > MOST_SCALED)), wanted)
    return moved


def _moved(
    donors_log1p: NDArray[np.float32], mean_log1p: NDArray[np.floating], factor: NDArray[np.float64], spread: float
) -> NDArray[np.float32]:
    """Scale each gene by its factor, or move it to the mean if the factor is NaN."""
    donors = np.ascontiguousarray(donors_log1p, dtype=np.float32)
    moved = np.empty(donors.shape, dtype=np.float32)
    centre = donors.mean(axis=0, dtype=np.float64)
    _move(donors, np.asarray(mean_log1p, dtype=np.float64), centre, factor, float(spread), moved)
    return moved


@compiled
def _move(donors: Any, mean: Any, centre: Any, factor: Any, spread: float, out: Any) -> None:
    for cell in range(donors.shape[0]):
        for gene in range(donors.shape[1]):
            value = np.float64(donors[cell, gene])
            if np.isnan(factor[gene]):
                out[cell, gene] = max(mean[gene] + spread * (value - centre[gene]), 0.0)
            else:
                out[cell, gene] = value * factor[gene]


@compiled
def _show_in_more_cells(cells: Any, genes: Any, mean: Any) -> None:
    """Set evenly spaced zeros of some genes to the mean of their other values, until the mean is met."""
    num_cells = len(cells)
    seen, total = np.zeros(len(genes)), np.zeros(len(genes))
    for cell in range(num_cells):
        for place in range(len(genes)):
            value = cells[cell, genes[place]]
            if value > 0:
                seen[place] += 1.0
                total[place] += value
    # of the zeros met so far, how many, how many got a value, and which is the next to get one
    zeros, given = np.zeros(len(genes), dtype=np.int64), np.zeros(len(genes), dtype=np.int64)
    following = np.zeros(len(genes), dtype=np.int64)
    number, step, typical = np.zeros(len(genes), dtype=np.int64), np.zeros(len(genes)), np.zeros(len(genes))
    for place in range(len(genes)):
        silent = num_cells - seen[place]
        typical[place] = total[place] / seen[place]
        missing = (mean[genes[place]] * num_cells - total[place]) / typical[place]
        number[place] = np.int64(min(np.rint(missing), silent))
        step[place] = silent / max(number[place], 1)
    for cell in range(num_cells):
        for place in range(len(genes)):
            if cells[cell, genes[place]] == 0:
                if given[place] < number[place] and zeros[place] == following[place]:
                    cells[cell, genes[place]] = typical[place]
                    given[place] += 1
                    following[place] = np.int64(given[place] * step[place])
                zeros[place] += 1
