"""Highly variable genes, from moments that are gathered block by block.

Source: Satija et al. 2015 (Seurat), the `seurat` flavour of scanpy: the dispersion (variance / mean) of normalised,
unlogged expression, standardised within 20 bins of equal width of the log mean.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

__all__ = ["Moments", "choose_hvgs", "normalised_dispersion"]

_NUM_BINS = 20


class Moments:
    """Mean and variance of each gene over the cells that measured it, gathered from blocks of cells.

    Parameters
    ----------
    num_cells
        How many of the cells to come measured each gene, (genes,).
    """

    def __init__(self, num_cells: np.ndarray) -> None:
        self._num_cells = num_cells
        self._sum = np.zeros(len(num_cells))
        self._squares = np.zeros(len(num_cells))

    def add(self, block: sparse.csr_matrix) -> None:
        """Add a block of cells, (n, genes)."""
        exact, ones = block.data.astype(np.float64), np.ones(block.shape[0])
        as_float64 = sparse.csr_matrix((exact, block.indices, block.indptr), shape=block.shape, copy=False)
        self._sum += np.asarray(as_float64.T @ ones)
        np.multiply(exact, exact, out=as_float64.data)
        self._squares += np.asarray(as_float64.T @ ones)

    @property
    def mean(self) -> np.ndarray:
        """The mean of each gene, float64 (genes,); 0 without cells."""
        return np.asarray(self._sum / np.maximum(1, self._num_cells))

    @property
    def variance(self) -> np.ndarray:
        """The unbiased variance of each gene, float64 (genes,); 0 with fewer than two cells."""
        centred = self._squares - self._sum * self._sum / np.maximum(1, self._num_cells)
        return np.asarray(np.where(self._num_cells < 2, 0, np.maximum(centred, 0) / np.maximum(1, self._num_cells - 1)))


def normalised_dispersion(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return the dispersion of each gene against the genes of its mean bin, (genes,); -inf where it has no variance.

    Parameters
    ----------
    mean, variance
        Of normalised expression before log1p, (genes,).
    """
    ratio = variance / np.where(mean > 0, mean, 1e-12)
    dispersion = np.log(ratio, out=np.full(len(mean), np.nan), where=ratio > 0)
    log_mean = np.log1p(mean)
    low, high = float(log_mean.min()), float(log_mean.max())
    width = (high - low) / _NUM_BINS
    position = (log_mean - low) / width if width > 0 else np.zeros(len(mean))
    bins = np.clip(np.ceil(position).astype(np.int64) - 1, 0, _NUM_BINS - 1)
    result = np.full(len(mean), -np.inf)
    for number in np.unique(bins):
        members = np.flatnonzero((bins == number) & ~np.isnan(dispersion))
        if len(members) == 1:
            result[members] = 1.0
        elif len(members):
            spread = dispersion[members].std(ddof=1)
            result[members] = (dispersion[members] - dispersion[members].mean()) / (spread if spread > 0 else 1.0)
    return result


def choose_hvgs(mean: np.ndarray, variance: np.ndarray, *, num: int) -> np.ndarray:
    """Return the positions of the `num` most variable genes, int64, ascending; all where there are fewer."""
    ranked = np.argsort(-normalised_dispersion(mean, variance), kind="stable")
    return np.sort(ranked[:num]).astype(np.int64)
