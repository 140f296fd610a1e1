"""Control cells moved by the predicted mean effect, in log1p: every value, or all but the zeros of rarely seen genes.

Legend of shapes: n cells, G genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SEEN_OFTEN", "shift", "shift_sparing_zeros"]

SEEN_OFTEN = 0.5
"""Zeros stay where fewer than this share of the control cells show a gene."""


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

    A gene that no control cell shows stays 0.

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
    moved[:, rare] = (cells * factor).astype(np.float32)
    return moved
