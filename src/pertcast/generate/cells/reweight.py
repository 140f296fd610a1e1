"""Reweight the counts of real control cells, one factor per gene, so that their pseudobulk is the predicted one.

A factor below 1 keeps each count with that chance (binomial thinning). A factor above 1 adds counts drawn from the
gamma posterior of the cell's own rate. So negative binomial donors stay negative binomial, with the larger mean and the
same dispersion, and zeros fill up as in real cells. A factor of 1 changes nothing. The mean of log1p(normalised), the
official pseudobulk, is met up to one count of one cell, which is rounded at random, so no gene is biased.

Legend of shapes: n cells, B batches, G genes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.files.resources import available_cpus
from pertcast.generate.cells.gene_counts import ALWAYS_ZERO, Gene, Law, aim_at, drawn, mean_unit, sum_of
from pertcast.generate.cells.mean_solver import expect_totals, new_search, solve, typical_cell
from pertcast.stats.counts import CountsFit
from pertcast.stats.draws import uniform
from pertcast.stats.groups import compiled


class Cells(NamedTuple):
    """Known values of every cell: its batch, its donor's total, and its normalisation factor."""

    batch: Any
    sizes: Any
    norm: Any


class Band(NamedTuple):
    """The donors' counts and the fit of some genes, and the position of their draws in the stream."""

    starts: Any  # Donors' counts by gene: those of gene number i are ``counts[starts[i]:starts[i + 1]]``
    rows: Any
    counts: Any
    share: Any  # (B, g), (g,), (g,) the fit
    shape: Any
    inflation: Any
    wanted: Any  # (g,) the pseudobulk to meet
    key: Any  # The key of the draws, the number of the first cell, of the first gene, and of the genes of all bands
    first_cell: Any
    first_gene: Any
    all_genes: Any
    real: bool  # Whether donors' own counts are re-weighted; otherwise all are drawn from the fit


@compiled
def make(band: Any, cells: Any, factors: Any, slopes: Any, enough: float) -> tuple[Any, Any, Any]:
    """Return the new counts of a band (starts, rows, values), rows ascending within a gene."""
    norm = cells.norm
    num_genes, num_cells, unit = len(band.starts) - 1, len(norm), mean_unit(norm)
    search = new_search(num_cells)
    count = np.zeros(num_cells, dtype=np.int64)
    u, mean = np.empty(num_cells), np.empty(num_cells)
    out_starts = np.zeros(num_genes + 1, dtype=np.int64)
    room = int(1.2 * len(band.rows)) + num_cells
    out_rows, out_values = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.float32)
    used = 0
    for number in range(num_genes):
        rows = band.rows[band.starts[number] : band.starts[number + 1]]
        counts = band.counts[band.starts[number] : band.starts[number + 1]]
        for entry in range(len(rows)):
            count[rows[entry]] = np.int64(counts[entry])
        law = Law(band.shape[number], band.inflation[number], band.real)
        _fill(band, number, cells, u, mean)
        gene = Gene(rows, count, u, mean, norm)
        now = sum_of(rows, counts, norm) if band.real else 0.0
        aim, start = aim_at(band, number, num_cells, unit), (factors[number], slopes[number])
        factors[number], is_drawn = solve(law, gene, search, now, aim, unit, start, enough)
        if used + num_cells > len(out_rows):
            out_rows, out_values = _grown(out_rows, out_values, used, num_cells)
        used = _emit(law, gene, search, factors[number], is_drawn, (out_rows, out_values), used)
        out_starts[number + 1] = used
        for entry in range(len(rows)):
            count[rows[entry]] = 0
    return out_starts, out_rows[:used], out_values[:used]


@compiled
def _fill(band: Any, number: int, cells: Any, u: Any, mean: Any) -> None:
    """Set the uniform numbers of a gene, and the expected count of each cell."""
    batch, sizes, share, inflation = cells.batch, cells.sizes, band.share, band.inflation[number]
    first = np.uint64(2) * (band.first_gene + np.uint64(number) + band.all_genes * band.first_cell)
    step = np.uint64(2) * band.all_genes
    for cell in range(len(u)):
        u[cell] = uniform(band.key, first + step * np.uint64(cell))
    if not band.real and inflation > 0.0:
        for cell in range(len(u)):
            if uniform(band.key, first + step * np.uint64(cell) + np.uint64(1)) < inflation:
                u[cell] = ALWAYS_ZERO
    for cell in range(len(u)):
        mean[cell] = share[batch[cell], number] * sizes[cell]


@compiled
def _emit(law: Law, gene: Any, search: Any, factor: float, is_drawn: bool, out: Any, used: int) -> int:
    """Write a gene's counts behind the others; return where they end."""
    cells, u, count, mean, now = gene.rows, gene.u, gene.count, gene.mean, search.now
    rows, values = out
    some = law.real and factor <= 1.0
    for place in range(len(cells) if some else len(u)):
        cell = cells[place] if some else place
        new = now[cell] if is_drawn else drawn(law, factor, u[cell], count[cell], mean[cell])
        if new > 0:
            rows[used], values[used] = cell, new
            used += 1
    return used


@compiled
def _grown(rows: Any, values: Any, used: int, more: int) -> tuple[Any, Any]:
    room = max(used + more, len(rows) + len(rows) // 2)
    wider_rows, wider_values = np.empty(room, dtype=rows.dtype), np.empty(room, dtype=values.dtype)
    wider_rows[:used], wider_values[:used] = rows[:used], values[:used]
    return wider_rows, wider_values


Float = NDArray[np.float64]

# how near the mean must come, in standard errors of it
_ENOUGH = 0.05
# the spread of the logarithm of drawn totals about the expected ones from which on cells are drawn again
_UNLIKE = 0.05
_BAND_GENES = 512
# how near the logarithm of the depth must come to the asked one's, in how many rounds; how slowly it may follow the
# totals at which the mean is met
_NEAR_DEPTH = 0.005
_MOST_ROUNDS = 6
_LEAST_RISE = 0.2


@dataclass(frozen=True)
class Donors:
    """Control cells from which new cells are made."""

    counts: sparse.csr_matrix  # (n, G) whole counts, CSR
    batch: NDArray[np.int64]  # (n,) int64, the batch of each in the fit
    target_sum: float  # What cells are normalised to before log1p

    @property
    def sizes(self) -> Float:
        """Counts of each cell, (n,)."""
        return _sizes(self.counts)


def reweight(
    donors: Donors,
    mean_log1p: NDArray[np.floating],
    fit: CountsFit,
    *,
    key: np.uint64,
    first_cell: int = 0,
    median_umi: float | None = None,
    from_fit: bool = False,
) -> sparse.csr_matrix:
    """Return as many new cells as donors, whole counts (n, G) float32."""
    counts, sizes = donors.counts, donors.sizes
    wanted = np.asarray(mean_log1p, dtype=np.float64)
    if wanted.shape != (counts.shape[1],) or not (np.isfinite(wanted).all() and (wanted >= 0).all()):
        raise ValueError(f"expected {counts.shape[1]} means of 0 or more, got {wanted.shape}")
    depth = 1.0 if median_umi is None else median_umi / max(float(np.median(sizes)), 1.0)
    norm = _norm(donors.target_sum, depth * sizes)
    typical = typical_cell(sizes, donors.target_sum / depth, real=not from_fit)
    factors, slopes = np.ones(counts.shape[1]), np.zeros(counts.shape[1])
    genes = [slice(start, start + _BAND_GENES) for start in range(0, counts.shape[1], _BAND_GENES)]
    by_gene = counts.tocsc()
    bands = [_band(by_gene, wanted, fit, part, (key, first_cell), real=not from_fit) for part in genes]

    def expected(number: int) -> Float:
        totals, part = np.zeros(len(sizes)), genes[number]
        expect_totals(bands[number], Cells(donors.batch, sizes, norm), typical, factors[part], slopes[part], totals)
        return totals

    def made(totals: Float) -> sparse.csr_matrix:
        cells = Cells(donors.batch, sizes, _norm(donors.target_sum, totals))
        parts = zip(bands, genes, strict=True)
        jobs = [pool.submit(make, band, cells, factors[part], slopes[part], _ENOUGH) for band, part in parts]
        return _to_csr([job.result() for job in jobs], counts.shape)

    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="pertcast-reweight") as pool:
        # cells have the totals that the effect leads to, about the depth that is asked for; in the order of the bands,
        # whichever was done first
        totals = np.sum(list(pool.map(expected, range(len(bands)))), axis=0)
        if median_umi is not None:
            totals *= median_umi / max(float(np.median(totals)), 1e-9)
        factors *= totals.sum() / max(depth * sizes.sum(), 1.0)
        cells = made(totals)
        if from_fit and _are_unlike(drawn := _sizes(cells), totals):
            # totals of shallow cells are mostly chance: the mean is met at those that were drawn
            factors *= drawn.sum() / totals.sum()
            totals = np.where(drawn > 0, drawn, totals)
            cells = made(totals)
        return cells if median_umi is None else _deepened(made, cells, totals, factors, median_umi)


def _deepened(
    made: Callable[[Float], sparse.csr_matrix],
    cells: sparse.csr_matrix,
    totals: Float,
    factors: Float,
    median_umi: float,
) -> sparse.csr_matrix:
    """Return cells of this median depth, by meeting the mean at smaller or larger totals."""
    enough = max(_NEAR_DEPTH, 0.5 / median_umi)
    moved, rise, found_before = 0.0, 1.0, 0.0
    for _ in range(_MOST_ROUNDS):
        found = math.log(max(float(np.median(_sizes(cells))), 0.5) / median_umi)
        if abs(found) <= enough:
            break
        if moved != 0.0:
            rise = min(max((found - found_before) / moved, _LEAST_RISE), 1.0)
        moved, found_before = -found / rise, found
        factors *= math.exp(moved)
        totals = totals * math.exp(moved)
        cells = made(totals)
    return cells


def _sizes(counts: sparse.csr_matrix) -> Float:
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def _are_unlike(drawn: Float, totals: Float) -> bool:
    there = (drawn > 0) & (totals > 0)
    return bool(there.any() and np.log(drawn[there] / totals[there]).std() > _UNLIKE)


def _norm(target_sum: float, totals: Float) -> Float:
    return np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)


def _band(
    by_gene: sparse.csc_matrix, wanted: Float, fit: CountsFit, part: slice, place: tuple[np.uint64, int], *, real: bool
) -> Band:
    starts = by_gene.indptr[part.start : part.stop + 1].astype(np.int64)
    return Band(
        starts - starts[0],
        by_gene.indices[starts[0] : starts[-1]],
        by_gene.data[starts[0] : starts[-1]],
        np.ascontiguousarray(fit.share[:, part]),
        fit.shape[part],
        fit.inflation[part],
        wanted[part],
        place[0],
        np.uint64(place[1]),
        np.uint64(part.start),
        np.uint64(by_gene.shape[1]),
        real,
    )


def _to_csr(bands: list[tuple[Any, Any, Any]], shape: tuple[int, int]) -> sparse.csr_matrix:
    """Join the counts of all bands to CSR (n, G)."""
    in_row = sum((np.bincount(rows, minlength=shape[0]) for _, rows, _ in bands), np.zeros(shape[0], dtype=np.int64))
    indptr = np.concatenate([[0], np.cumsum(in_row)]).astype(np.int64)
    genes, values = np.empty(indptr[-1], dtype=np.int32), np.empty(indptr[-1], dtype=np.float32)
    cursor, first_gene = indptr[:-1].copy(), 0
    for starts, rows, counts in bands:
        _place(starts, rows, counts, first_gene, cursor, genes, values)
        first_gene += len(starts) - 1
    return sparse.csr_matrix((values, genes, indptr), shape=shape)


@compiled
def _place(starts: Any, rows: Any, counts: Any, first_gene: int, cursor: Any, genes: Any, values: Any) -> None:
    for number in range(len(starts) - 1):
        for entry in range(starts[number], starts[number + 1]):
            at = cursor[rows[entry]]
            genes[at], values[at] = first_gene + number, counts[entry]
            cursor[rows[entry]] = at + 1
