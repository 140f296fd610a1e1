"""How much of the variance of cells a label such as the batch explains.

Legend of shapes: N cells, G genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["explained_share"]


def explained_share(
    values_NG: NDArray[np.floating], labels_N: NDArray[np.integer], within_N: NDArray[np.integer]
) -> float:
    """Return the share of the variance within groups that a label explains, over all genes together.

    It is omega squared: the sum of squares between labels less what chance alone gives it, over the total one. So it is
    0 on average where the label means nothing, however many labels there are, and may fall below 0.

    Parameters
    ----------
    values_NG
        Any measure of cells.
    labels_N
        What may explain it, as codes.
    within_N
        Groups, as codes; differences between them do not count.

    Returns
    -------
    At most 1; NaN where no group has two labels, one of them of two cells.

    Examples
    --------
    >>> values = np.array([[1.0], [1.0], [3.0], [3.0]])
    >>> explained_share(values, np.array([0, 0, 1, 1]), np.zeros(4, dtype=int))
    1.0
    """
    total, inside = 0.0, 0.0
    num_groups, num_parts, num_cells = 0, 0, 0
    for group in np.unique(within_N):
        rows = np.flatnonzero(within_N == group)
        labels = np.unique(labels_N[rows])
        if len(labels) < 2:
            continue
        total += _squares(values_NG[rows])
        inside += sum(_squares(values_NG[rows[labels_N[rows] == label]]) for label in labels)
        num_groups, num_parts, num_cells = num_groups + 1, num_parts + len(labels), num_cells + len(rows)
    if num_cells <= num_parts:
        return float("nan")
    chance = inside / (num_cells - num_parts)
    if total + chance == 0:
        return float("nan")
    return (total - inside - (num_parts - num_groups) * chance) / (total + chance)


def _squares(values: NDArray[np.floating]) -> float:
    """Return the sum of squares around the mean of each gene."""
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    return float(np.square(centred).sum())
