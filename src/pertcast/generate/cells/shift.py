"""Control cells moved by the predicted mean effect, in log1p: every value, or all but the zeros of rarely seen genes.

Legend of shapes: n cells, G genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_SCALED", "SEEN_OFTEN", "shift", "shift_sparing_zeros"]

SEEN_OFTEN = 0.5
"""Zeros stay where fewer than this share of the control cells show a gene."""
MOST_SCALED = 2.0
"""A log1p value is scaled no further: beyond it a rise means that more cells show the gene, not that they show more."""


def shift(
    donors_log1p: NDArray[np.float32], mean_log1p: NDArray[np.floating], *, spread: float = 1.0
) -> NDArray[np.float32]:
    """Return the predicted mean with each control cell's residual on it, cut off at 0, (n, G).

    Parameters
    ----------
    donors_log1p
        (n, G) control cells, one for each new cell.
    mean_log1p
        (G,) the predicted mean; where cells are cut off at 0, theirs is above it.
    spread
        What residuals are multiplied by; 1 keeps the controls' variance.

    Examples
    --------
    >>> shift(np.array([[0.0], [2.0]], dtype=np.float32), np.array([0.5])).tolist()
    [[0.0], [1.5]]
    """
    centre = donors_log1p.mean(axis=0, dtype=np.float64)
    moved = np.asarray(mean_log1p) + spread * (donors_log1p - centre)
    return np.asarray(np.maximum(moved, 0), dtype=np.float32)


def shift_sparing_zeros(
    donors_log1p: NDArray[np.float32], mean_log1p: NDArray[np.floating], *, spread: float = 1.0
) -> NDArray[np.float32]:
    """Return the same, but zeros stay where a gene is rarely seen: its other values are scaled to the predicted mean.

    Where that would take more than `MOST_SCALED` times a value, further cells show the gene, as many as the mean needs,
    each at the mean of those that do. A gene that no control cell shows stays 0.

    Examples
    --------
    >>> donors = np.array([[0.0], [0.0], [2.0]], dtype=np.float32)
    >>> shift_sparing_zeros(donors, np.array([1.0])).tolist()
    [[0.0], [0.0], [3.0]]
    """
    wanted = np.asarray(mean_log1p, dtype=np.float64)
    moved = shift(donors_log1p, wanted, spread=spread)
    rare = np.count_nonzero(donors_log1p, axis=0) < SEEN_OFTEN * len(donors_log1p)
    if not rare.any():
        return moved
    cells = donors_log1p[:, rare]
    centre = cells.mean(axis=0, dtype=np.float64)
    factor = np.divide(wanted[rare], centre, out=np.zeros_like(centre), where=centre > 0)
    scaled = (cells * np.minimum(factor, MOST_SCALED)).astype(np.float32)
    for gene in np.flatnonzero(factor > MOST_SCALED):
        _show_in_more_cells(scaled[:, gene], float(wanted[rare][gene]))
    moved[:, rare] = scaled
    return moved


def _show_in_more_cells(gene_n: NDArray[np.float32], mean: float) -> None:
    """Give evenly spaced zeros of a gene the mean of its other values, until its mean is the wanted one."""
    typical = float(gene_n[gene_n > 0].mean())
    silent = np.flatnonzero(gene_n == 0)
    number = min(round((mean * len(gene_n) - float(gene_n.sum())) / typical), len(silent))
    gene_n[silent[np.linspace(0, len(silent), number, endpoint=False).astype(np.int64)]] = typical
