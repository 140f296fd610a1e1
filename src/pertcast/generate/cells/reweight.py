"""Counts of real control cells, each gene's re-weighted by one factor, so that their pseudobulk is the predicted one.

A factor below 1 keeps each single count with that chance (binomial thinning); a factor above 1 adds counts drawn from
what the cell's own count says about its rate: a gamma posterior, so of donors that are negative binomial the result is
negative binomial with the larger mean and the same dispersion, and zeros fill up as in real cells. A factor of 1
changes nothing: without an effect the cells are the donors. What is met is the mean of log1p(normalised), which is what
the official metrics call pseudobulk, up to one count of one cell: that is rounded at random, so no gene is biased.

Legend of shapes: n cells, B batches, G genes.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.files.cpus import available_cpus
from pertcast.generate.cells.factor import Gene, drawn, solve
from pertcast.stats.counts import CountsFit
from pertcast.stats.groups import compiled
from pertcast.stats.uniforms import uniform

__all__ = ["Donors", "reweight"]

Float = NDArray[np.float64]

# how near the mean must come, in standard errors of it: the second pass knows the totals that the effect leads to
_ENOUGH = (0.25, 0.05)
_UNCHANGED = 1e-3


@dataclass(frozen=True)
class Donors:
    """Control cells that new cells are made of.

    Attributes
    ----------
    counts
        (n, G) whole counts, CSR.
    batch
        (n,) int64, the batch of each in the fit.
    target_sum
        What cells are normalised to before log1p.
    """

    counts: sparse.csr_matrix
    batch: NDArray[np.int64]
    target_sum: float

    @property
    def sizes(self) -> Float:
        """Counts of each cell, (n,)."""
        return np.asarray(self.counts.sum(axis=1, dtype=np.float64)).ravel()


@compiled
def _grown(rows: Any, values: Any, used: int, more: int) -> tuple[Any, Any]:
    if used + more <= len(rows):
        return rows, values
    room = max(used + more, len(rows) + len(rows) // 2)
    wider_rows, wider_values = np.empty(room, dtype=rows.dtype), np.empty(room, dtype=values.dtype)
    wider_rows[:used], wider_values[:used] = rows[:used], values[:used]
    return wider_rows, wider_values


@compiled
def _make(
    columns: Any, cells: Any, fit: Any, wanted: Any, factors: Any, place: Any, real: bool, enough: float
) -> tuple[Any, Any, Any]:
    """Return the new counts of a band of genes (starts, rows, values).

    `columns` are starts, rows and counts of the donors by gene; `cells` their batch, sizes, norm (what a count is
    multiplied by before log1p) and scale (of the whole cell's rate); `factors` (G,) are taken as they are where
    `wanted` is empty, else solved for, beginning with them, and changed in place; `place` is where draws stand in
    their stream: the key, the first cell, the first gene, and how many genes there are in all bands.
    """
    starts, rows, counts = columns
    batch, sizes, norm, scale = cells
    share, shapes, inflation = fit
    key, first_cell, first_gene, all_genes = place
    num_genes, num_cells = len(starts) - 1, len(batch)
    unit = 0.0
    for cell in range(num_cells):
        unit += math.log1p(norm[cell]) / num_cells
    count = np.zeros(num_cells, dtype=np.int64)
    u, extra_u, mean = np.empty(num_cells), np.empty(num_cells), np.empty(num_cells)
    out_starts = np.zeros(num_genes + 1, dtype=np.int64)
    room = int(1.2 * len(rows)) + num_cells
    out_rows, out_values = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.float32)
    used = 0
    for number in range(num_genes):
        mine, theirs = rows[starts[number] : starts[number + 1]], counts[starts[number] : starts[number + 1]]
        for entry in range(len(mine)):
            count[mine[entry]] = np.int64(theirs[entry])
        for cell in range(num_cells):
            draw = np.uint64(2) * (first_gene + np.uint64(number) + all_genes * (first_cell + np.uint64(cell)))
            u[cell] = uniform(key, draw)
            if not real and inflation[number] > 0.0:
                extra_u[cell] = uniform(key, draw + np.uint64(1))
            mean[cell] = share[batch[cell], number] * sizes[cell]
        gene = Gene(mine, theirs, count, u, mean, norm, shapes[number], inflation[number], extra_u, real)
        if len(wanted):
            draw = first_gene + np.uint64(number) + all_genes * first_cell
            dither = uniform(key ^ np.uint64(0x5851F42D4C957F2D), draw)
            aim = wanted[number] * num_cells + (dither - 0.5) * (1.0 - _UNCHANGED) * unit
            factors[number] = solve(gene, max(aim, 0.0), unit, factors[number], enough)
        used = _emit(gene, factors[number] * scale, out_rows, out_values, used)
        if used < 0:
            out_rows, out_values = _grown(out_rows, out_values, out_starts[number], num_cells)
            used = _emit(gene, factors[number] * scale, out_rows, out_values, out_starts[number])
        out_starts[number + 1] = used
        for entry in range(len(mine)):
            count[mine[entry]] = 0
    return out_starts, out_rows[:used], out_values[:used]


@compiled
def _emit(gene: Any, factor: float, rows: Any, values: Any, used: int) -> int:
    """Write a gene's counts behind the others; return where they end, -1 where there may be no room."""
    if used + len(gene.norm) > len(rows):
        return -1
    if gene.real and factor <= 1.0:
        for entry in range(len(gene.rows)):
            count = drawn(gene, gene.rows[entry], factor)
            if count > 0:
                rows[used], values[used] = gene.rows[entry], count
                used += 1
        return used
    for cell in range(len(gene.norm)):
        count = drawn(gene, cell, factor)
        if count > 0:
            rows[used], values[used] = cell, count
            used += 1
    return used


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
    """Return as many new cells as there are donors, whole counts (n, G) float32.

    Parameters
    ----------
    donors
        Control cells, one for each new cell.
    mean_log1p
        (G,) the pseudobulk to meet: the mean over cells of log1p(count * target_sum / total), at the donors' depth.
    fit
        How counts of such cells vary.
    key
        Of :func:`pertcast.stats.uniforms.uniform_key`; equal keys and donors give equal cells.
    first_cell
        How many cells of this key were made before these.
    median_umi
        The median total that the new cells should have: all rates are scaled by one number, after the effect, so that
        zeros and noise are those of cells of that depth. ``None`` keeps the donors' depth.
    from_fit
        Draw counts from the fit alone, with the donors' totals and batches; their own counts are not used then, and
        genes do not vary together.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a mean is negative or not finite.
    """
    counts, sizes = donors.counts, donors.sizes
    wanted = np.asarray(mean_log1p, dtype=np.float64)
    if wanted.shape != (counts.shape[1],) or not (np.isfinite(wanted).all() and (wanted >= 0).all()):
        raise ValueError(f"expected {counts.shape[1]} means of 0 or more, got {wanted.shape}")
    by_gene = counts.tocsc()
    # bands of genes are worked on at once; no count depends on how many there are
    threads = max(1, min(available_cpus(), counts.shape[1]))
    bounds = np.linspace(0, counts.shape[1], threads + 1).astype(np.int64)
    factors = np.ones(counts.shape[1])

    def made(totals: Float, aims: Float, scale: float, enough: float) -> sparse.csr_matrix:
        norm = np.divide(donors.target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
        cells = donors.batch, sizes, norm, scale

        def band(start: int, stop: int) -> sparse.csc_matrix:
            place = key, np.uint64(first_cell), np.uint64(start), np.uint64(counts.shape[1])
            first, last = by_gene.indptr[start], by_gene.indptr[stop]
            columns = (
                by_gene.indptr[start : stop + 1].astype(np.int64) - first,
                by_gene.indices[first:last],
                by_gene.data[first:last],
            )
            known = np.ascontiguousarray(fit.share[:, start:stop]), fit.shape[start:stop], fit.inflation[start:stop]
            starts, rows, values = _make(
                columns, cells, known, aims[start:stop], factors[start:stop], place, not from_fit, enough
            )
            return sparse.csc_matrix((values, rows, starts), shape=(len(sizes), stop - start))

        bands = list(pool.map(band, bounds[:-1].tolist(), bounds[1:].tolist()))
        joined: sparse.csr_matrix = sparse.hstack(bands, format="csr")
        return joined

    with ThreadPoolExecutor(threads, thread_name_prefix="pertcast-reweight") as pool:
        totals = sizes
        for enough in _ENOUGH:
            cells = made(totals, wanted, 1.0, enough)
            totals = np.asarray(cells.sum(axis=1, dtype=np.float64)).ravel()
        if median_umi is None or not np.median(totals) > 0:
            return cells
        return made(totals, np.empty(0), median_umi / float(np.median(totals)), 0.0)
