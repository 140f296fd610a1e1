"""The size of an effect from which on the official test calls a gene, about: what a soft version of it compares with.

Invariant: of the values, only those of TRAIN control cells are read.
Shapes: N training perturbations (each in its context), G predicted genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.stats.de import FDR

__all__ = ["call_thresholds"]

_CELLS_AT_ONCE = 512


def call_thresholds(
    store: Store, codes: NDArray[np.int64], num_significant: NDArray[np.int64], genes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the effects, in log1p units, from which on the test calls a gene, ``(N, G)``.

    ``z sd sqrt(1 / cells + 1 / controls)``: the standard error of a difference of means, with the spread of the
    screen's control cells on both sides, times the normal quantile of the largest p-value that Benjamini and Hochberg
    let pass where the perturbation has as many differentially expressed genes as it has (at least one). The test itself
    is of ranks; for log1p values of single cells the two are close. A gene that hardly any control cell shows counts as
    seen in one of them, as 1. Screens of a context are combined as their effects are, weighted by cells.

    Parameters
    ----------
    store
        The training store.
    codes
        (N, 2) the context and the perturbation.
    num_significant
        (N,) how many of all genes were differentially expressed.
    genes
        Positions of the predicted genes, ascending.

    References
    ----------
    Benjamini and Hochberg, "Controlling the false discovery rate", 1995.
    """
    row_of = {pair: row for row, pair in enumerate(map(tuple, codes.tolist()))}
    trained = store.rows(split=Split.TRAIN)
    sources = store.screen_codes[trained].astype(np.int64) * len(store.perts) + store.pert_codes[trained]
    distinct, sizes = np.unique(sources, return_counts=True)
    num_cells = {
        divmod(source, len(store.perts)): size for source, size in zip(distinct.tolist(), sizes.tolist(), strict=True)
    }
    variance_NG, total_N = np.zeros((len(codes), len(genes))), np.zeros(len(codes))
    for screen, of in enumerate(store.screens):
        num_controls = num_cells.get((screen, store.control_code), 0)
        if not num_controls:
            continue
        controls = store.screen_rows(screen, split=Split.TRAIN, pert=store.control_code)
        spread_G = np.maximum(_spread(store, controls)[genes], 1 / np.sqrt(num_controls))
        for (other, pert), size in num_cells.items():
            row = row_of.get((of.context, pert))
            if other == screen and row is not None:
                variance_NG[row] += (size * spread_G) ** 2 * (1 / size + 1 / num_controls)
                total_N[row] += size
    share_N = FDR * np.maximum(num_significant, 1) / len(store.genes)
    quantile_N = -special.ndtri(np.minimum(share_N, 1) / 2)
    threshold_NG = (quantile_N / np.maximum(total_N, 1))[:, None] * np.sqrt(variance_NG)
    return threshold_NG.astype(np.float32)


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
