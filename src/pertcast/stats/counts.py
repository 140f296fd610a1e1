"""How counts of control cells vary: each gene's share of a cell's counts, by batch, its dispersion, its extra zeros.

Legend of shapes: n cells, B batches, G genes. A count of gene g in a cell of batch b with L counts in all is negative
binomial with mean ``L * share[b, g]`` and variance ``mean + mean**2 / shape[g]``; with chance ``inflation[g]`` it is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.stats.groups import compiled

__all__ = ["CountsFit", "fit_counts"]

Float = NDArray[np.float64]

_PRIOR_CELLS = 10.0
_MAX_SHAPE = 1e6
_MAX_SIZES = 256
_ZERO_POINTS = 0.02
_ZERO_SIGMAS = 4.0
_HALVINGS = 16


class CountsFit(NamedTuple):
    """What control cells of one context say about counts.

    Attributes
    ----------
    share
        (B, G) share of each gene in the counts of a cell, pulled towards that of all batches by ten cells' worth of
        it; above 0 everywhere: a gene that no cell shows gets half a count among all cells.
    shape
        (G,) 1 / dispersion; genes that say little about theirs have nearly that of the others.
    inflation
        (G,) chance of a zero beside those of the negative binomial; 0 unless the cells show more zeros than it gives.
    """

    share: Float
    shape: Float
    inflation: Float


@compiled
def _add(indptr: Any, genes: Any, counts: Any, sizes: Any, batch: Any, first: Any, second: Any, sized: Any) -> None:
    for row in range(len(indptr) - 1):
        group, size = batch[row], sizes[row]
        for entry in range(indptr[row], indptr[row + 1]):
            gene, count = genes[entry], np.float64(counts[entry])
            first[group, gene] += count
            second[group, gene] += count * count
            sized[group, gene] += count * size


def fit_counts(blocks: Iterable[tuple[sparse.csr_matrix, NDArray[np.int64]]], *, num_batches: int) -> CountsFit:
    """Fit the distribution of counts by moments, in one pass and memory of a few (B, G) arrays.

    Parameters
    ----------
    blocks
        Whole counts (n, G) of control cells, and the batch of each, (n,), from 0 to ``num_batches - 1``.
    num_batches
        B, at least 1.

    Raises
    ------
    ValueError
        If there is no cell, or none has a count.

    Examples
    --------
    >>> cells = sparse.csr_matrix(np.array([[2.0, 0.0], [4.0, 0.0]]))
    >>> fit_counts([(cells, np.zeros(2, dtype=np.int64))], num_batches=1).share.round(3).tolist()
    [[1.0, 0.069]]
    """
    sums: list[Float] = []
    sizes: list[Float] = []
    batches: list[NDArray[np.int64]] = []
    seen: NDArray[np.int64] | None = None
    for counts, batch in blocks:
        if seen is None:
            sums = [np.zeros((num_batches, counts.shape[1])) for _ in range(3)]
            seen = np.zeros(counts.shape[1], dtype=np.int64)
        size = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        _add(counts.indptr, counts.indices, counts.data, size, batch, *sums)
        seen += np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1])
        sizes.append(size)
        batches.append(batch)
    all_sizes = np.concatenate(sizes) if sizes else np.zeros(0)
    if seen is None or not all_sizes.sum() > 0:
        raise ValueError("expected control cells with counts")
    batch_of_cell = np.concatenate(batches)
    share = _shares(sums[0], all_sizes, batch_of_cell)
    shape = _shapes(sums, share, all_sizes, batch_of_cell)
    return _with_inflation(share, shape, 1.0 - seen / len(all_sizes), all_sizes)


def _shares(first: Float, sizes: Float, batch: NDArray[np.int64]) -> Float:
    total = sizes.sum()
    overall = np.maximum(first.sum(axis=0), 0.5) / total
    prior = _PRIOR_CELLS * sizes.mean()
    in_batch = np.bincount(batch, weights=sizes, minlength=len(first))
    return (first + prior * overall) / (in_batch + prior)[:, None]


def _shapes(sums: list[Float], share: Float, sizes: Float, batch: NDArray[np.int64]) -> Float:
    """Return 1 / dispersion by moments, each gene's pulled to that of all as far as its own is uncertain."""
    first, second, sized = sums
    in_batch = np.bincount(batch, weights=sizes, minlength=len(first))[:, None]
    squares = np.bincount(batch, weights=sizes**2, minlength=len(first))[:, None]
    of_means = (share**2 * squares).sum(axis=0)
    excess = (second - 2 * share * sized - share * in_batch).sum(axis=0) + of_means
    own = np.divide(excess, of_means, out=np.zeros_like(excess), where=of_means > 0)
    # of Poisson counts, the dispersion found by moments has the variance 2 / (n * mean**2)
    weight = of_means / 2
    most = np.quantile(weight, 0.9)
    common = max(float(np.average(np.clip(own, 0, 10), weights=np.minimum(weight, most) + 1e-12)), 1e-3)
    pull = 1 / common**2
    dispersion = (weight * own + pull * common) / (weight + pull)
    return 1 / np.maximum(dispersion, 1 / _MAX_SHAPE)


def _with_inflation(share: Float, shape: Float, zeros: Float, sizes: Float) -> CountsFit:
    """Give genes extra zeros where they show two points and four standard errors more than the distribution has."""
    picked = np.sort(sizes)[np.linspace(0, len(sizes) - 1, min(_MAX_SIZES, len(sizes))).astype(np.int64)]
    overall = share.mean(axis=0)
    expected = _zeros(overall, shape, picked)
    error = np.sqrt(np.maximum(expected * (1 - expected), 1e-9) / len(sizes))
    asking = np.flatnonzero(zeros - expected > np.maximum(_ZERO_POINTS, _ZERO_SIGMAS * error))
    inflation = np.zeros(len(shape))
    if len(asking):
        # a share p of extra zeros leaves the variance as it is where 1 + 1/shape shrinks by 1 - p
        spread = 1 + 1 / shape[asking]
        low, high = np.zeros(len(asking)), 1 - 1 / spread
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            narrower = 1 / np.maximum(spread * (1 - middle) - 1, 1 / _MAX_SHAPE)
            found = middle + (1 - middle) * _zeros(overall[asking] / (1 - middle), narrower, picked)
            low, high = np.where(found < zeros[asking], middle, low), np.where(found < zeros[asking], high, middle)
        inflation[asking] = (low + high) / 2
        shape = shape.copy()
        shape[asking] = 1 / np.maximum(spread * (1 - inflation[asking]) - 1, 1 / _MAX_SHAPE)
    return CountsFit(share, shape, inflation)


def _zeros(share: Float, shape: Float, sizes: Float) -> Float:
    """Return the chance of a zero of each gene, (G,), over cells of these sizes."""
    total = np.zeros(len(share))
    for size in sizes.tolist():
        total += np.exp(-shape * np.log1p(share * size / shape))
    return total / len(sizes)
