"""The gene list of a store, the mapping of each file's genes to it, and highly variable genes.

Invariant: the order is the list's. A gene that a file lacks is an error, or is asked for by name and noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from pertcast.errors import Problem
from pertcast.files.obs import near_misses

_NUM_NAMED = 10


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED:,} more" if len(names) > _NUM_NAMED else "")


class GeneMap:
    """Map blocks of a file's genes to the store's genes."""

    def __init__(self, position: np.ndarray, num_genes: int) -> None:
        self._position = position
        self._num_genes = num_genes
        self.measured = np.zeros(num_genes, dtype=bool)
        self.measured[position[position >= 0]] = True
        self._same = len(position) == num_genes and bool((position == np.arange(num_genes)).all())
        kept = position[position >= 0]
        self._ordered = bool((np.diff(kept) > 0).all())

    def apply(self, block: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return the block over the store's genes, columns sorted, without explicit zeros."""
        data, indices, indptr = block.data, block.indices, block.indptr.astype(np.int64)
        if not self._same:
            indices = self._position[indices]
        kept = data != 0 if self._same else (data != 0) & (indices >= 0)
        if not kept.all():
            before = np.concatenate([[0], np.cumsum(kept)])
            data, indices, indptr = data[kept], indices[kept], before[indptr]
        result = sparse.csr_matrix((data, indices, indptr), shape=(block.shape[0], self._num_genes), copy=False)
        if not self._ordered:
            result.sort_indices()
        return result


def map_genes(
    path: Path, file_genes: Sequence[str], genes: Sequence[str], *, fill_missing: bool
) -> tuple[GeneMap, list[str], Problem | None]:
    """Return where a file's genes go, notes on dropped or zero-filled genes, and problems."""
    place_of = {gene: place for place, gene in enumerate(genes)}
    position = np.array([place_of.get(gene, -1) for gene in file_genes], dtype=np.int32)
    here = set(file_genes)
    missing = [gene for gene in genes if gene not in here]
    extra = [gene for gene in file_genes if gene not in place_of]
    notes = [f"{path.name}: {len(extra):,} genes that are not in the gene list were dropped: {_some(extra)}"] * bool(
        extra
    )
    if not missing:
        return GeneMap(position, len(genes)), notes, None
    if fill_missing and len(missing) < len(genes):
        notes.append(f"{path.name}: {len(missing):,} genes that it lacks count as 0 in its cells: {_some(missing)}")
        return GeneMap(position, len(genes)), notes, None
    near = [f"{gene} is there as {close[0]}" for gene in missing[:3] if (close := near_misses(gene, extra, num=1))]
    remedy = "name its genes as the list does" + (f" ({'; '.join(near)})" if near else "")
    if len(missing) < len(genes):
        remedy += ', or set prepare.missing_genes = "zero" to count them as 0'
    message = f"it lacks {len(missing):,} of the {len(genes):,} genes of the list: {_some(missing)}"
    return GeneMap(position, len(genes)), notes, Problem(f"{path}, var_names", message, remedy)


_NUM_BINS = 20


class Moments:
    """Mean and variance of each gene over the cells that measured it, updated block by block."""

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
    """Return the dispersion of each gene against the genes of its mean bin, (genes,); -inf where it has no variance."""
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
    """Return the positions of the `num` most variable genes, ascending; all if there are fewer."""
    ranked = np.argsort(-normalised_dispersion(mean, variance), kind="stable")
    return np.sort(ranked[:num]).astype(np.int64)
