"""Fit how the counts of control cells vary, and compute quantiles of count distributions.

Legend of shapes: n cells, B batches, G genes. A count of gene g in a cell of batch b with L counts in all is negative
binomial with mean ``L * share[b, g]`` and variance ``mean + mean**2 / shape[g]``; with chance ``inflation[g]`` it is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.stats.groups import compiled

Float = NDArray[np.float64]

_PRIOR_CELLS = 10.0
_MAX_SHAPE = 1e6
_MAX_SIZES = 256
_ZERO_POINTS = 0.02
_ZERO_SIGMAS = 4.0
_HALVINGS = 16


class CountsFit(NamedTuple):
    """The fitted counts of one context's control cells."""

    # (B, G) share of each gene in the counts of a cell, pulled towards that of all batches by ten cells'
    # worth of it; above 0 everywhere: a gene that no cell shows gets half a count among all cells
    share: Float
    shape: Float  # (G,) 1 / dispersion; genes that say little about theirs have nearly that of the others
    # (G,) chance of a zero beside those of the negative binomial; 0 unless the cells show more zeros than it
    # gives
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
    """Return 1 / dispersion by moments, each gene's shrunk to the common value by its uncertainty."""
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
    """Add extra zeros for genes with two points and four standard errors more than the distribution has."""
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
    """Return each gene's chance of a zero over cells of these sizes."""
    total = np.zeros(len(share))
    for size in sizes.tolist():
        total += np.exp(-shape * np.log1p(share * size / shape))
    return total / len(sizes)


# above these means a continuous approximation is used; both are good to a fraction of a count there
_LARGE_BINOMIAL = 12.0
LARGE_NB = 40.0
"""The largest mean of which negative binomial quantiles are exact."""
_MOST_TERMS = 100_000
_NOTHING = 1e-18
_AT_ONCE = 4  # terms between two looks at whether to go on: a processor guesses wrong at every end
_INVERSES = 1.0 / np.maximum(np.arange(128), 1)  # a product is ready sooner than a quotient


@compiled
def normal_quantile(u: float) -> float:
    """Return the standard normal quantile of `u` in (0, 1), to 2e-9 (rational approximation of P. J. Acklam)."""
    if u < 0.02425 or u > 1.0 - 0.02425:
        tail = min(u, 1.0 - u)
        q = math.sqrt(-2.0 * math.log(tail))
        top = -7.784894002430293e-03 * q - 3.223964580411365e-01
        top = ((top * q - 2.400758277161838) * q - 2.549732539343734) * q + 4.374664141464968
        top = top * q + 2.938163982698783
        bottom = (7.784695709041462e-03 * q + 3.224671290700398e-01) * q + 2.445134137142996
        bottom = (bottom * q + 3.754408661907416) * q + 1.0
        return top / bottom if u < 0.5 else -top / bottom
    q = u - 0.5
    r = q * q
    top = (-3.969683028665376e01 * r + 2.209460984245205e02) * r - 2.759285104469687e02
    top = ((top * r + 1.383577518672690e02) * r - 3.066479806614716e01) * r + 2.506628277459239
    bottom = (-5.447609879822406e01 * r + 1.615858368580409e02) * r - 1.556989798598866e02
    bottom = ((bottom * r + 6.680131188771972e01) * r - 1.328068155288572e01) * r + 1.0
    return top * q / bottom


@compiled
def binomial_quantile(u: float, trials: int, chance: float) -> int:
    """Return the number of successes among `trials` with probability `chance`, for a uniform `u`."""
    if trials <= 0 or chance <= 0.0:
        return 0
    if chance >= 1.0:
        return trials
    if trials == 1:
        return 1 if u > 1.0 - chance else 0
    if chance > 0.5:  # count the failures, which are the fewer
        return trials - _few(1.0 - u, trials, 1.0 - chance)
    return _few(u, trials, chance)


@compiled
def is_exact_binomial(trials: int) -> bool:
    """Return whether binomial quantiles of so many trials are exact."""
    return trials <= 2.0 * _LARGE_BINOMIAL


@compiled
def _few(u: float, trials: int, chance: float) -> int:
    mean = trials * chance
    if mean > _LARGE_BINOMIAL:
        near = mean + normal_quantile(u) * math.sqrt(mean * (1.0 - chance))
        return min(max(math.floor(near + 0.5), 0), trials)
    if 1.0 - u >= mean:  # no more than `mean` of the mass is above 0
        return 0
    odds = chance / (1.0 - chance)
    mass = _power(1.0 - chance, trials)
    below, number, passed = mass, 0, int(u > mass)
    while u > below and number < trials:
        for _ in range(_AT_ONCE):
            mass *= odds * max(trials - number, 0) * _inverse(number + 1)
            number += 1
            below += mass
            passed += u > below
    return min(passed, trials)


@compiled
def _power(base: float, exponent: int) -> float:
    """Return a whole power, faster than by logarithms for few trials."""
    if exponent > 32:
        return math.exp(exponent * math.log(base))
    power = 1.0
    while exponent > 0:
        if exponent & 1:
            power *= base
        base *= base
        exponent >>= 1
    return power


@compiled
def _inverse(number: int) -> float:
    return _INVERSES[number] if number < len(_INVERSES) else 1.0 / number


@compiled
def negative_binomial_quantile(u: float, mean: float, shape: float) -> int:
    """Return a count of a negative binomial with variance ``mean + mean ** 2 / shape``, for a uniform `u`."""
    if mean <= 0.0 or 1.0 - u >= mean:  # no more than `mean` of the mass is above 0
        return 0
    if mean > LARGE_NB:
        # a gamma variable of the same mean and variance, by Wilson and Hilferty
        order = mean * shape / (mean + shape)
        root = 1.0 - 1.0 / (9.0 * order) + normal_quantile(u) / (3.0 * math.sqrt(order))
        return math.floor(mean * max(root, 0.0) ** 3 + 0.5)
    share = mean / (mean + shape)
    ratio = mean / shape
    # the plain logarithm takes half the time, and is as good where one and the ratio are of like size
    mass = math.exp(-shape * (math.log(1.0 + ratio) if ratio > 0.01 else math.log1p(ratio)))
    below, number, passed = mass, 0, int(u > mass)
    while u > below and number < _MOST_TERMS and (mass >= _NOTHING or number <= mean):
        for _ in range(_AT_ONCE):
            mass *= share * (shape + number) * _inverse(number + 1)
            number += 1
            below += mass
            passed += u > below
    return passed
