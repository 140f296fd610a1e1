"""Compare generated cells with real ones: DE calls, variance, zeros and gene-gene correlation.

Generated and real cells are each compared with a *reference*, other real cells. The real cells show which values to
expect. Legend of shapes: n, m cells, G genes; values are log1p and not negative.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.stats.de import differential_expression
from pertcast.stats.groups import group_cells
from pertcast.stats.metrics import is_significant

_SEEN_IN = 10
_TOP_GENES = 100


class Likeness(NamedTuple):
    """The comparison of some cells with reference cells."""

    num_cells: int  # Cells compared
    de_calls: int  # Genes called DE against the reference (two-sided Wilcoxon, FDR 0.05)
    # Quantiles .1, .5, .9, over genes that at least ten reference cells show, of the variance over the
    # reference's
    variance_ratio: tuple[float, float, float]
    # Quantiles .05, .5, .95 over these genes of the share of zeros minus the reference's, and their mean
    zero_difference: tuple[float, float, float, float]
    # Correlation, over pairs of the 100 most expressed genes, of the two gene-gene correlations; NaN for few
    # genes
    correlation: float


def _moments(cells: sparse.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean, the variance and the share of zeros of each gene."""
    number = max(cells.shape[0], 1)
    mean = np.asarray(cells.sum(axis=0, dtype=np.float64)).ravel() / number
    square = np.bincount(cells.indices, weights=cells.data.astype(np.float64) ** 2, minlength=cells.shape[1]) / number
    seen = np.bincount(cells.indices[cells.data != 0], minlength=cells.shape[1])
    return mean, np.maximum(square - mean**2, 0) * number / max(number - 1, 1), 1 - seen / number


def gene_correlation(cells: sparse.csr_matrix, genes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return Pearson's correlation of each pair of genes, (k * (k - 1) / 2,); 0 where a gene does not vary."""
    values = cells[:, genes].toarray().astype(np.float64)
    values -= values.mean(axis=0)
    norms = np.linalg.norm(values, axis=0)
    values = np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)
    return np.asarray((values.T @ values)[np.triu_indices(len(genes), 1)])


class Reference:
    """Real reference cells, with their precomputed statistics."""

    def __init__(self, cells: sparse.csr_matrix) -> None:
        _refuse_few(cells)
        self.num_cells = cells.shape[0]
        self.groups = group_cells(cells.astype(np.float32), np.zeros(cells.shape[0], dtype=np.int64))
        mean, self.variance, self.zeros = _moments(cells)
        self.shown = ((1 - self.zeros) * self.num_cells >= min(_SEEN_IN, self.num_cells)) & (self.variance > 0)
        self.top = np.argsort(-mean, kind="stable")[: min(_TOP_GENES, int((mean > 0).sum()))]
        self.pairs = gene_correlation(cells, self.top)


def _refuse_few(cells: sparse.csr_matrix) -> None:
    if cells.shape[0] < 2:
        raise ValueError(f"expected two cells or more, got {cells.shape[0]}")


def compare_cells(cells: sparse.csr_matrix, reference: Reference) -> Likeness:
    """Compare cells (n, G), log1p, with reference cells.

    >>> random = np.random.default_rng(0)
    >>> one, other = (sparse.csr_matrix(np.log1p(random.poisson(4, (60, 5)))) for _ in range(2))
    >>> compare_cells(one, Reference(other)).de_calls
    0
    """
    _refuse_few(cells)
    ours = group_cells(cells.astype(np.float32), np.zeros(cells.shape[0], dtype=np.int64))
    table = differential_expression(ours, reference.groups)
    _, variance, zeros = _moments(cells)
    shown, nothing = reference.shown, np.full(1, np.nan)
    ratio = variance[shown] / reference.variance[shown] if shown.any() else nothing
    difference = (zeros - reference.zeros)[shown] if shown.any() else nothing
    pairs = gene_correlation(cells, reference.top)
    varied = len(pairs) > 2 and np.ptp(pairs) > 0 and np.ptp(reference.pairs) > 0
    low, middle, high = np.quantile(ratio, [0.1, 0.5, 0.9]).tolist()
    few, typical, many = np.quantile(difference, [0.05, 0.5, 0.95]).tolist()
    return Likeness(
        num_cells=cells.shape[0],
        de_calls=int(is_significant(table.fdr).sum()),
        variance_ratio=(low, middle, high),
        zero_difference=(few, typical, many, float(difference.mean())),
        correlation=float(np.corrcoef(pairs, reference.pairs)[0, 1]) if varied else float("nan"),
    )


def explained_share(
    values_NG: NDArray[np.floating], labels_N: NDArray[np.integer], within_N: NDArray[np.integer]
) -> float:
    """Return the share of variance within groups that a label explains, over all genes together.

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
