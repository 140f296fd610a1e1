"""From which size of effect on the official test calls a gene, about: what a soft version of the test compares with.

Invariant: of the store, TRAIN control cells alone are read.
Shapes: N training perturbations (each in its context), C contexts, G predicted genes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.stats.de import FDR

__all__ = ["Called", "call_thresholds"]

_CELLS_AT_ONCE = 512


class Called(NamedTuple):
    """What the official test said of training perturbations, over all genes.

    Attributes
    ----------
    contexts, num_cells, num_significant
        (N,) int64: the context's code, how many cells were tested, how many genes were differentially expressed.
    """

    contexts: NDArray[np.int64]
    num_cells: NDArray[np.int64]
    num_significant: NDArray[np.int64]


def call_thresholds(store: Store, called: Called, genes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the effects, in log1p units, from which on the test calls a gene, ``(N, G)``.

    ``z sd sqrt(1 / cells + 1 / controls)``: the standard error of a difference of means, with the spread of the
    context's control cells on both sides, times the normal quantile of the largest p-value that Benjamini and Hochberg
    let pass where the perturbation has as many differentially expressed genes as it has (at least one). The test itself
    is of ranks; for log1p values of single cells the two are close. A gene that hardly any control cell shows counts as
    seen in one of them, as 1.

    Parameters
    ----------
    store
        The training store.
    called
        What the test said.
    genes
        Positions of the predicted genes, ascending.

    References
    ----------
    Benjamini and Hochberg, "Controlling the false discovery rate", 1995.
    """
    threshold_NG = np.zeros((len(called.contexts), len(genes)), dtype=np.float32)
    share_N = FDR * np.maximum(called.num_significant, 1) / len(store.genes)
    quantile_N = -special.ndtri(np.minimum(share_N, 1) / 2)
    for context in np.unique(called.contexts).tolist():
        mine = np.flatnonzero(called.contexts == context)
        controls = store.rows(split=Split.TRAIN, context=context, pert=store.control_code)
        spread_G = np.maximum(_spread(store, controls)[genes], 1 / np.sqrt(max(len(controls), 1)))
        error_N = np.sqrt(1 / np.maximum(called.num_cells[mine], 1) + 1 / max(len(controls), 1))
        threshold_NG[mine] = (quantile_N[mine] * error_N)[:, None] * spread_G
    return threshold_NG


def _spread(store: Store, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the standard deviation of each gene's log1p values over some cells."""
    sums, squares = np.zeros(len(store.genes)), np.zeros(len(store.genes))
    for start in range(0, len(rows), _CELLS_AT_ONCE):
        block = store.csr(rows[start : start + _CELLS_AT_ONCE])
        values = block.data.astype(np.float64)
        sums += np.bincount(block.indices, weights=values, minlength=len(sums))
        squares += np.bincount(block.indices, weights=values**2, minlength=len(squares))
    count = max(len(rows), 1)
    variance: NDArray[np.float64] = np.maximum(squares / count - (sums / count) ** 2, 0)
    return np.sqrt(variance)
