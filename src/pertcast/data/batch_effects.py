"""How much of what is learnt, perturbed minus control cells, is batch: with controls of any batch and of its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pertcast.data.sets import training_sets
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.stats.variance import explained_share

__all__ = ["BatchEffects", "batch_effects"]

_NUM_CELLS = 4096
_SET_SIZE = 32


class BatchEffects(NamedTuple):
    """Shares of the variance of perturbed minus control cells that the batch explains, within a screen and target.

    Attributes
    ----------
    before, after
        Each cell less a control of any batch of its file; and less one of its own batch, where there is one.
    num_cells
        Cells that were looked at.
    """

    before: float
    after: float
    num_cells: int

    def __str__(self) -> str:
        """Say it in a sentence; an estimate below 0 is 0 and noise."""
        before, after = max(self.before, 0.0), max(self.after, 0.0)
        return (
            f"batch explains {before:.1%} of the variance of perturbed minus control cells where controls are of "
            f"any batch, {after:.1%} where they are of the cell's own (train.match = 'batch'), "
            f"by {self.num_cells:,} cells"
        )


def batch_effects(store: Store, *, seed: int = 0) -> BatchEffects | None:
    """Measure batch effects on training cells and highly variable genes, or return ``None`` where there is one batch.

    Parameters
    ----------
    store
        The training store; at most some thousand cells of it are read.
    seed
        Which cells those are.
    """
    train = (store.split & Split.TRAIN) != 0
    if len(np.unique(store.batch_codes[train & (store.batch_codes >= 0)])) < 2:
        return None
    shares = []
    for match in ("context", "batch"):
        sets = training_sets(
            store, set_size=_SET_SIZE, seed=seed, epoch=0, split=Split.TRAIN, match=match, control_sets=False
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
