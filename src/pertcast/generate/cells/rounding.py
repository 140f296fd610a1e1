"""Between the scales, for cells that were made: log1p to whole counts by rounding at random, and a cap on a cell's sum.

Legend of shapes: n cells, G genes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.stats.groups import compiled
from pertcast.stats.uniforms import uniform

__all__ = ["cap_totals", "round_to_counts"]


@compiled
def _round(indptr: Any, genes: Any, values: Any, factors: Any, num_genes: int, key: Any, first_cell: Any) -> None:
    for cell in range(len(indptr) - 1):
        for entry in range(indptr[cell], indptr[cell + 1]):
            place = np.uint64(genes[entry]) + np.uint64(num_genes) * (first_cell + np.uint64(cell))
            values[entry] = np.floor(np.expm1(np.float64(values[entry])) * factors[cell] + uniform(key, place))


def round_to_counts(
    log1p: sparse.csr_matrix, totals: NDArray[np.floating], *, key: np.uint64, first_cell: int = 0
) -> sparse.csr_matrix:
    """Return whole counts (n, G) float32 with these expected totals, each rounded up with the chance of its fraction.

    Parameters
    ----------
    log1p
        Normalised expression (n, G), of any total.
    totals
        (n,) counts that each cell should have; expected, since rounding adds its noise.
    key
        Of :func:`pertcast.stats.uniforms.uniform_key`; a cell's draws do not depend on the others.
    first_cell
        How many cells of this key were made before these.

    Examples
    --------
    >>> from pertcast.stats.uniforms import uniform_key
    >>> cells = sparse.csr_matrix(np.log1p([[1.0, 3.0, 0.0]]))
    >>> round_to_counts(cells, np.array([8.0]), key=uniform_key(0)).toarray().tolist()
    [[2.0, 6.0, 0.0]]
    """
    now = np.asarray(log1p.expm1().sum(axis=1, dtype=np.float64)).ravel()
    factors = np.divide(totals, now, out=np.zeros_like(now), where=now > 0)
    counts = log1p.astype(np.float32, copy=True)
    _round(counts.indptr, counts.indices, counts.data, factors, counts.shape[1], key, np.uint64(first_cell))
    counts.eliminate_zeros()
    return counts


def cap_totals(counts: sparse.csr_matrix, cap: int | None) -> sparse.csr_matrix:
    """Return whole counts with no cell's total above the cap: those of a cell above it are scaled and rounded down."""
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    if cap is None or not (totals > cap).any():
        return counts
    factors = np.minimum(1.0, cap / np.maximum(totals, 1.0))
    values = np.floor(counts.data * np.repeat(factors, np.diff(counts.indptr))).astype(np.float32)
    capped = sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape, copy=True)
    capped.eliminate_zeros()
    return capped
