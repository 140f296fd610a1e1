"""Co-expression of genes in training control cells: loadings and correlations, within each screen.

Cells are centred on the mean of their own screen, so technical differences between screens do not count as co-
expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from pertcast.data.split import Split
from pertcast.errors import DataError
from pertcast.stats.draws import generator

MAX_CELLS = 4096
_CHUNK = 512


class FeatureStore(Protocol):
    """The parts of a store that features need; see ``pertcast.data.store.Store``."""

    @property
    def genes(self) -> Sequence[str]: ...
    @property
    def perts(self) -> Sequence[str]: ...
    @property
    def control(self) -> str: ...
    @property
    def control_code(self) -> int: ...
    @property
    def pert_codes(self) -> NDArray[np.int32]: ...
    @property
    def screen_codes(self) -> NDArray[np.int32]: ...
    @property
    def split(self) -> NDArray[np.uint8]: ...
    def log1p(self, rows: NDArray[np.int64], *, genes: NDArray[np.int64] | None = None) -> NDArray[np.float32]: ...


def train_controls(store: FeatureStore) -> tuple[NDArray[np.int64], int]:
    """Return rows of training control cells, at most `MAX_CELLS` of them, and their total number."""
    rows = np.flatnonzero(((store.split & Split.TRAIN) != 0) & (store.pert_codes == store.control_code)).astype(
        np.int64
    )
    if len(rows) <= MAX_CELLS:
        return rows, len(rows)
    drawn = generator(0, "features", "control cells").choice(rows, MAX_CELLS, replace=False)
    return np.sort(drawn), len(rows)


def coexpression_loadings(
    store: FeatureStore, rows: NDArray[np.int64], *, num_loadings: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return each gene's loadings on the leading components of control cells, and which genes vary."""
    num_genes = len(store.genes)
    most = max(min(len(rows) - 1, num_genes), 0)
    if num_loadings > most:
        raise DataError(
            f"features.num_loadings is {num_loadings}, and {len(rows)} training control cells of {num_genes} genes "
            f"have at most {most} components; set features.num_loadings to at most {most}, or use another features.kind"
        )
    centred = np.empty((len(rows), num_genes), dtype=np.float32)
    for start in range(0, len(rows), _CHUNK):
        centred[start : start + _CHUNK] = store.log1p(rows[start : start + _CHUNK])
    varies = np.zeros(num_genes, dtype=bool)
    screens = store.screen_codes[rows]
    for screen in np.unique(screens):
        cells = centred[screens == screen]
        varies |= cells.max(axis=0) > cells.min(axis=0)
        centred[screens == screen] = cells - cells.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred /= np.float32(np.sqrt(len(rows)))
    wide = len(rows) <= num_genes
    gram = (centred @ centred.T if wide else centred.T @ centred).astype(np.float64)
    side = len(gram)
    values, vectors = linalg.eigh(
        gram, subset_by_index=[side - num_loadings, side - 1], overwrite_a=True, check_finite=False
    )
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    loadings: NDArray[np.float32]
    loadings = centred.T @ vectors.astype(np.float32) if wide else (vectors * np.sqrt(values)).astype(np.float32)
    largest = loadings[np.abs(loadings).argmax(axis=0), np.arange(num_loadings)]
    return loadings * np.where(largest < 0, -1, 1).astype(np.float32), varies


def gene_correlations(
    store: FeatureStore, rows: NDArray[np.int64], *, genes: NDArray[np.int64], others: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return Pearson correlations of log1p values, (genes, others); NaN if a gene does not vary."""
    both = np.concatenate([genes, others])
    covariance = np.zeros((len(both), len(both)))
    for screen in np.unique(store.screen_codes[rows]):
        mine = rows[store.screen_codes[rows] == screen]
        total, products = np.zeros(len(both)), np.zeros((len(both), len(both)))
        # a shift near the mean keeps the sums of squares from cancelling
        shift = store.log1p(mine[:_CHUNK], genes=both).mean(axis=0, dtype=np.float64)
        for start in range(0, len(mine), _CHUNK):
            block = store.log1p(mine[start : start + _CHUNK], genes=both).astype(np.float64) - shift
            total += block.sum(axis=0)
            products += block.T @ block
        covariance += products - np.outer(total, total) / len(mine)
    spread = np.sqrt(np.where(np.diag(covariance) > 1e-9, np.diag(covariance), np.nan))
    return (covariance / spread[:, None] / spread)[: len(genes), len(genes) :]
