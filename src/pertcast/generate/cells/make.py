"""Make the cells of a part from the prediction and real control cells, on the requested scale.

Only `model` keeps the predicted cells. All other ways need only their mean, so a part is predicted first and then made
block by block. Draws are keyed by the seed, context, target and cell number.

Legend of shapes: C cells of a block, G genes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.config import GenerateConfig
from pertcast.data.counts_fit import fit_rows
from pertcast.data.store import Store
from pertcast.files.scales import normalise_log1p
from pertcast.generate.cells.counts_head import draw_counts
from pertcast.generate.cells.reweight import Donors, reweight
from pertcast.generate.cells.shift import shift, shift_sparing_zeros
from pertcast.generate.plan import Part
from pertcast.stats.counts import CountsFit
from pertcast.stats.draws import generator, uniform, uniform_key
from pertcast.stats.groups import compiled


@compiled
def _round(indptr: Any, genes: Any, values: Any, factors: Any, num_genes: int, key: Any, first_cell: Any) -> None:
    for cell in range(len(indptr) - 1):
        for entry in range(indptr[cell], indptr[cell + 1]):
            place = np.uint64(genes[entry]) + np.uint64(num_genes) * (first_cell + np.uint64(cell))
            values[entry] = np.floor(np.expm1(np.float64(values[entry])) * factors[cell] + uniform(key, place))


def round_to_counts(
    log1p: sparse.csr_matrix, totals: NDArray[np.floating], *, key: np.uint64, first_cell: int = 0
) -> sparse.csr_matrix:
    """Return whole counts with these expected totals; each value is rounded up with the chance of its fraction.

    >>> from pertcast.stats.draws import uniform_key
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
    """Scale down the counts of cells whose total is above the cap."""
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    if cap is None or not (totals > cap).any():
        return counts
    factors = np.minimum(1.0, cap / np.maximum(totals, 1.0))
    values = np.floor(counts.data * np.repeat(factors, np.diff(counts.indptr))).astype(np.float32)
    capped = sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape, copy=True)
    capped.eliminate_zeros()
    return capped


_BLOCK_CELLS = 1024
_STORED_CELLS = 256
_MOST_BATCHES = 64


class CellMaker:
    """Make the cells of one part after another."""

    def __init__(
        self, store: Store, config: GenerateConfig, *, cap: int | None = None, shapes: NDArray[np.float64] | None = None
    ) -> None:
        self._shapes = shapes
        self._store, self._config, self._cap = store, config, cap
        self._fits: dict[tuple[str, str], CountsFit] = {}
        self._fitting = Lock()

    @property
    def have_a_depth(self) -> bool:
        """Whether cells come from whole counts, so that their depth can be requested."""
        return self._config.reads_counts

    def copied(self, rows: NDArray[np.int64]) -> Iterator[sparse.csr_matrix]:
        """Yield control cells unchanged, on the requested scale."""
        read = self._store.counts if self._config.scale == "counts" else self._store.csr
        for first in range(0, len(rows), _BLOCK_CELLS):
            block = read(rows[first : first + _BLOCK_CELLS])
            yield cap_totals(block, self._cap) if self._config.scale == "counts" else block

    @property
    def keep_predicted(self) -> bool:
        """Whether the network's own cells are written; every other way needs only their mean."""
        return self._config.cells == "model"

    def made(
        self, part: Part, rows: NDArray[np.int64], predicted: Iterator[NDArray[np.float32]], *, pool: NDArray[np.int64]
    ) -> Iterator[sparse.csr_matrix]:
        """Return the cells of a part, CSR float32; where only the predicted mean matters, it is taken at once."""
        if self.keep_predicted:
            return self._as_predicted(part, rows, predicted)
        return self._around(part, rows, self._mean(predicted), pool)

    def _mean(self, predicted: Iterator[NDArray[np.float32]]) -> NDArray[np.float64]:
        total, number = np.zeros(len(self._store.genes)), 0
        for cells_CG in predicted:
            total += cells_CG.sum(axis=0, dtype=np.float64)
            number += len(cells_CG)
            del cells_CG  # the next ones are waited for without these
        mean = total / max(number, 1)
        return mean if self._config.cells == "nb_head" else np.asarray(np.maximum(mean, 0))

    def _around(
        self, part: Part, rows: NDArray[np.int64], mean: NDArray[np.float64], pool: NDArray[np.int64]
    ) -> Iterator[sparse.csr_matrix]:
        num_blocks = -(-len(rows) // _BLOCK_CELLS)
        bounds = np.linspace(0, len(rows), num_blocks + 1).astype(np.int64).tolist()
        for first, stop in itertools.pairwise(bounds):
            if self._config.cells in ("shift", "sparse"):
                yield self._shifted(part, rows, mean, first, stop)
            elif self._config.cells == "nb_head":
                yield self._from_head(part, rows, mean, slice(first, stop), pool)
            else:
                yield self._drawn(part, rows[first:stop], mean, first, pool)

    def _key(self, part: Part) -> np.uint64:
        return uniform_key(self._config.seed, "cells", part.context, part.target)

    def _as_predicted(
        self, part: Part, rows: NDArray[np.int64], predicted: Iterator[NDArray[np.float32]]
    ) -> Iterator[sparse.csr_matrix]:
        first = 0
        for cells_CG in predicted:
            for start in range(0, len(cells_CG), _STORED_CELLS):
                some_CG = np.maximum(cells_CG[start : start + _STORED_CELLS], np.float32(0))
                yield self._on_scale(part, rows, dense_to_csr(some_CG), first)
                first += len(some_CG)
            del cells_CG  # the next ones are waited for without these

    def _shifted(
        self, part: Part, rows: NDArray[np.int64], mean: NDArray[np.float64], first: int, stop: int
    ) -> sparse.csr_matrix:
        move = shift if self._config.cells == "shift" else shift_sparing_zeros
        cells_CG = move(self._store.log1p(rows[first:stop]), mean, spread=self._config.residual_scale)
        return self._on_scale(part, rows, dense_to_csr(cells_CG), first)

    def _on_scale(self, part: Part, rows: NDArray[np.int64], log1p: sparse.csr_matrix, first: int) -> sparse.csr_matrix:
        """Return log1p cells unchanged, or rounded to counts with their control cells' totals."""
        if self._config.scale == "log1p":
            return log1p
        mine = self._totals(part, rows)[first : first + log1p.shape[0]]
        return cap_totals(round_to_counts(log1p, mine, key=self._key(part), first_cell=first), self._cap)

    def _totals(self, part: Part, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the total of each cell: its control cell's, scaled to the requested median."""
        totals = self._store.totals[rows].astype(np.float64)
        return totals if part.median_umi is None else totals * (part.median_umi / max(float(np.median(totals)), 1.0))

    def _from_head(
        self, part: Part, rows: NDArray[np.int64], log_fold: NDArray[np.float64], block: slice, pool: NDArray[np.int64]
    ) -> sparse.csr_matrix:
        assert self._shapes is not None
        fit = self._fit((part.dataset, part.context), pool)
        counts = draw_counts(
            fit.share,
            log_fold,
            np.where(np.isnan(self._shapes), fit.shape, self._shapes),
            batch=self._batches(pool, rows[block]),
            sizes=self._totals(part, rows)[block],
            key=self._key(part),
            first_cell=block.start,
        )
        return self._scaled(counts)

    def _scaled(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return counts on the requested scale."""
        if self._config.scale == "counts":
            return cap_totals(counts, self._cap)
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        return normalise_log1p(counts, totals, self._store.target_sum or 1.0)

    def _drawn(
        self, part: Part, rows: NDArray[np.int64], mean: NDArray[np.float64], first: int, pool: NDArray[np.int64]
    ) -> sparse.csr_matrix:
        target_sum = self._store.target_sum or 1.0
        counts = reweight(
            Donors(self._store.counts(rows), self._batches(pool, rows), target_sum),
            mean,
            self._fit((part.dataset, part.context), pool),
            key=self._key(part),
            first_cell=first,
            median_umi=part.median_umi,
            from_fit=self._config.cells == "negative_binomial",
        )
        return self._scaled(counts)

    def _batches(self, pool: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index of each row's batch in the pool; one index for all if there are very many batches."""
        names = np.unique(self._store.batch_codes[pool])
        if len(names) > _MOST_BATCHES:
            return np.zeros(len(rows), dtype=np.int64)
        return np.searchsorted(names, self._store.batch_codes[rows]).astype(np.int64)

    def _fit(self, source: tuple[str, str], pool: NDArray[np.int64]) -> CountsFit:
        with self._fitting:
            if source not in self._fits:
                batch, random = self._batches(pool, pool), generator(self._config.seed, "fit of counts", source[1])
                self._fits[source] = fit_rows(self._store, pool, batch, num_batches=int(batch.max()) + 1, random=random)
            return self._fits[source]


def dense_to_csr(cells_CG: NDArray[np.float32]) -> sparse.csr_matrix:
    """Convert cells to CSR, faster than SciPy's way over coordinates."""
    found = sparse.csr_matrix(_stored(np.ascontiguousarray(cells_CG)), shape=cells_CG.shape)
    found.has_canonical_format = True
    return found


@compiled
def _stored(cells: Any) -> Any:
    """Return the values that are not 0, their columns, and where rows start."""
    starts = np.zeros(len(cells) + 1, dtype=np.int64)
    for row in range(len(cells)):
        number = 0
        for column in range(cells.shape[1]):
            number += cells[row, column] != 0
        starts[row + 1] = starts[row] + number
    # a 0 is written, too, and the next value takes its place: this is faster than a branch
    values, columns = np.empty(starts[-1] + 1, dtype=cells.dtype), np.empty(starts[-1] + 1, dtype=np.int32)
    place = 0
    for row in range(len(cells)):
        for column in range(cells.shape[1]):
            values[place], columns[place] = cells[row, column], column
            place += cells[row, column] != 0
    return values[:place], columns[:place], starts
