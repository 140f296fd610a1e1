"""Fit the distribution of counts on a sample of a store's cells, and measure batch effects."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.data.cell_sets import training_sets
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.stats.counts import CountsFit, fit_counts
from pertcast.stats.realism import explained_share

_MOST_CELLS = 4096
_CELLS_AT_ONCE = 512


def fit_rows(
    store: Store, rows: NDArray[np.int64], batch: NDArray[np.int64], *, num_batches: int, random: np.random.Generator
) -> CountsFit:
    """Fit the counts of at most 4,096 cells of a store."""
    if len(rows) > _MOST_CELLS:
        drawn = np.sort(random.choice(len(rows), _MOST_CELLS, replace=False))
        rows, batch = rows[drawn], batch[drawn]
    blocks = (slice(first, first + _CELLS_AT_ONCE) for first in range(0, len(rows), _CELLS_AT_ONCE))
    return fit_counts(((store.counts(rows[block]), batch[block]) for block in blocks), num_batches=num_batches)


_NUM_CELLS = 4096
_SET_SIZE = 32


class BatchEffects(NamedTuple):
    """Share of the variance of perturbed minus control cells that the batch explains, within a screen and target."""

    # Each cell less a control of any batch of its file; and less one of its own batch, where there is one
    before: float
    after: float
    num_cells: int  # Cells that were looked at

    def __str__(self) -> str:
        """Describe it in a sentence; an estimate below 0 is noise and becomes 0."""
        before, after = max(self.before, 0.0), max(self.after, 0.0)
        return (
            f"batch explains {before:.1%} of the variance of perturbed minus control cells where controls are of "
            f"any batch, {after:.1%} where they are of the cell's own (train.match = 'batch'), "
            f"by {self.num_cells:,} cells"
        )


def batch_effects(store: Store) -> BatchEffects | None:
    """Measure batch effects on training cells and highly variable genes; return ``None`` if there is one batch."""
    train = (store.split & Split.TRAIN) != 0
    if len(np.unique(store.batch_codes[train & (store.batch_codes >= 0)])) < 2:
        return None
    shares = []
    for match in ("context", "batch"):
        sets = training_sets(
            store, set_size=_SET_SIZE, seed=0, epoch=0, split=Split.TRAIN, match=match, control_sets=False
        )[: _NUM_CELLS // _SET_SIZE]
        # a small group repeats its cells within a set
        rows, first = np.unique(sets.pert_rows.reshape(-1), return_index=True)
        controls = sets.control_rows.reshape(-1)[first]
        known = store.batch_codes[rows] >= 0
        rows, controls = rows[known], controls[known]
        values = store.log1p(rows, genes=store.hvg) - store.log1p(controls, genes=store.hvg)
        within = store.screen_codes[rows].astype(np.int64) * len(store.perts) + store.pert_codes[rows]
        shares.append(explained_share(values, store.batch_codes[rows], within))
    before, after = shares
    return None if before != before else BatchEffects(before, after, len(rows))
