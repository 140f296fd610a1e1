"""How the counts of some of a store's cells vary, fitted on as many of them as are needed, block by block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pertcast.data.store import Store
from pertcast.stats.counts import CountsFit, fit_counts

__all__ = ["fit_rows"]

_MOST_CELLS = 4096
_CELLS_AT_ONCE = 512


def fit_rows(
    store: Store, rows: NDArray[np.int64], batch: NDArray[np.int64], *, num_batches: int, random: np.random.Generator
) -> CountsFit:
    """Fit the counts of cells of a store, of at most 4,096 of them.

    Parameters
    ----------
    store, rows
        Which cells, (n,), ascending.
    batch, num_batches
        (n,) the batch of each, from 0 to ``num_batches - 1``.
    random
        Draws cells where there are more.

    Raises
    ------
    ValueError
        If there is no cell, or none has a count.
    """
    if len(rows) > _MOST_CELLS:
        drawn = np.sort(random.choice(len(rows), _MOST_CELLS, replace=False))
        rows, batch = rows[drawn], batch[drawn]
    blocks = (slice(first, first + _CELLS_AT_ONCE) for first in range(0, len(rows), _CELLS_AT_ONCE))
    return fit_counts(((store.counts(rows[block]), batch[block]) for block in blocks), num_batches=num_batches)
