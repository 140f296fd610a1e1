"""Draw counts from the counts head: control rates times predicted folds, with its dispersions.

Legend of shapes: n cells, B batches, G genes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.stats.counts import negative_binomial_quantile
from pertcast.stats.draws import uniform
from pertcast.stats.groups import compiled

Float = NDArray[np.float64]

# e ** 10: a bound for genes that hardly any control cell shows
_LARGEST_LOG_FOLD = 10.0


@compiled
def _draw(batch: Any, sizes: Any, share: Any, shape: Any, key: Any, first_cell: Any) -> tuple[Any, Any, Any]:
    num_cells, num_genes = len(sizes), share.shape[1]
    starts = np.zeros(num_cells + 1, dtype=np.int64)
    genes = np.empty(num_cells * num_genes, dtype=np.int32)
    values = np.empty(num_cells * num_genes, dtype=np.float32)
    used = 0
    for cell in range(num_cells):
        for gene in range(num_genes):
            place = np.uint64(gene) + np.uint64(num_genes) * (first_cell + np.uint64(cell))
            mean = sizes[cell] * share[batch[cell], gene]
            count = negative_binomial_quantile(uniform(key, place), mean, shape[gene])
            if count > 0:
                genes[used], values[used] = gene, count
                used += 1
        starts[cell + 1] = used
    return starts, genes[:used].copy(), values[:used].copy()


def draw_counts(
    share: Float,
    log_fold: NDArray[np.floating],
    shape: NDArray[np.floating],
    *,
    batch: NDArray[np.int64],
    sizes: Float,
    key: np.uint64,
    first_cell: int = 0,
) -> sparse.csr_matrix:
    """Return whole counts (n, G) float32, with expected totals `sizes`.

    >>> from pertcast.stats.draws import uniform_key
    >>> draw_counts(
    ...     np.array([[0.5, 0.5]]), np.array([0.0, -99.0]), np.full(2, 1e5),
    ...     batch=np.zeros(1, dtype=np.int64), sizes=np.array([1e6]), key=uniform_key(0),
    ... ).toarray().round(-5).tolist()
    [[1000000.0, 0.0]]
    """
    rates = share * np.exp(np.clip(np.asarray(log_fold, dtype=np.float64), -_LARGEST_LOG_FOLD, _LARGEST_LOG_FOLD))
    rates /= rates.sum(axis=1, keepdims=True)
    starts, genes, values = _draw(
        batch, np.asarray(sizes, dtype=np.float64), rates, np.asarray(shape, np.float64), key, np.uint64(first_cell)
    )
    return sparse.csr_matrix((values, genes, starts), shape=(len(sizes), share.shape[1]))
