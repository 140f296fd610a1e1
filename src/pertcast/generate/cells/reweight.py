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
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.stats.counts import CountsFit
from pertcast.stats.groups import compiled
from pertcast.stats.quantiles import binomial_quantile, negative_binomial_quantile
from pertcast.stats.uniforms import uniform

__all__ = ["Donors", "reweight"]

Float = NDArray[np.float64]

# how near the mean must come, in standard errors of it: the second pass knows the totals that the effect leads to
_ENOUGH = (0.25, 0.05)
_UNCHANGED = 1e-3
_MOST_STEPS = 24
_LARGEST_FACTOR = 1e9


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


class _Gene(NamedTuple):
    """One gene: its donors' counts (of those that have some), and what is known of every cell."""

    rows: Any
    kept: Any
    count: Any
    u: Any
    mean: Any
    norm: Any
    shape: float
    inflation: float
    extra_u: Any
    real: bool


@compiled
def _drawn(gene: Any, cell: int, factor: float) -> Any:
    """Return a cell's new count at a factor; the same uniform number at every factor."""
    if not gene.real:
        if gene.inflation > 0.0 and gene.extra_u[cell] < gene.inflation:
            return 0
        return negative_binomial_quantile(gene.u[cell], factor * gene.mean[cell] / (1.0 - gene.inflation), gene.shape)
    count = gene.count[cell]
    if factor < 1.0:
        return binomial_quantile(gene.u[cell], count, factor)
    if factor == 1.0:
        return count
    shape = gene.shape + count
    more = (factor - 1.0) * shape * gene.mean[cell] / (gene.shape + gene.mean[cell])
    return count + negative_binomial_quantile(gene.u[cell], more, shape)


@compiled
def _moments(gene: Any, factor: float) -> tuple[float, float]:
    """Return the sum and the sum of squares of log1p(normalised) at a factor."""
    total, square = 0.0, 0.0
    if gene.real and factor <= 1.0:
        for entry in range(len(gene.rows)):
            cell = gene.rows[entry]
            count = _drawn(gene, cell, factor)
            if count > 0:
                value = math.log1p(count * gene.norm[cell])
                total += value
                square += value * value
        return total, square
    for cell in range(len(gene.norm)):
        count = _drawn(gene, cell, factor)
        if count > 0:
            value = math.log1p(count * gene.norm[cell])
            total += value
            square += value * value
    return total, square


@compiled
def _first_factor(wanted: float, now: float, expected: float, gene: Any) -> float:
    """Return a first guess; of rare genes the mean is linear in what is added, of others its expm1 in the factor."""
    num_cells = len(gene.norm)
    if wanted < now:
        return math.expm1(wanted / num_cells) / math.expm1(now / num_cells)
    if now / num_cells < 0.05:
        return 1.0 + (wanted - now) / max(expected, 1e-300)
    return math.expm1(wanted / num_cells) / math.expm1(now / num_cells)


@compiled
def _solve(gene: Any, wanted: float, unit: float, guess: float, enough: float) -> float:
    """Return the factor at which the sum of log1p(normalised) is nearest to `wanted`; `unit` is one count's worth."""
    now, _ = _moments(gene, 1.0)
    if abs(wanted - now) <= 0.5 * unit:
        return 1.0
    num_cells = len(gene.norm)
    if wanted <= 0.0:
        return 0.0
    low, low_value, high, high_value = 0.0, 0.0, 1.0, now
    best, best_miss = 1.0, abs(wanted - now)
    factor = guess
    if guess <= 0.0 or guess == 1.0:
        expected = 0.0
        for cell in range(num_cells):
            expected += gene.mean[cell] * gene.shape / (gene.shape + gene.mean[cell]) * math.log1p(gene.norm[cell])
        factor = _first_factor(wanted, now, expected, gene)
    bounded = wanted < now
    if not bounded:
        low, low_value, high, high_value = 1.0, now, _LARGEST_FACTOR, 0.0
        factor = max(factor, 1.0 + 1e-9)
    elif factor >= 1.0 or factor <= 0.0:
        factor = wanted / now
    low_weight = high_weight = 1.0
    for _ in range(_MOST_STEPS):
        value, square = _moments(gene, factor)
        miss = value - wanted
        if abs(miss) < best_miss:
            best, best_miss = factor, abs(miss)
        variance = max(square / num_cells - (value / num_cells) ** 2, 0.0)
        if abs(miss) <= max(0.5 * unit, enough * math.sqrt(variance * num_cells)):
            return factor
        if miss < 0.0:
            low, low_value = factor, value
            low_weight, high_weight = 1.0, high_weight * 0.5
        else:
            high, high_value, bounded = factor, value, True
            low_weight, high_weight = low_weight * 0.5, 1.0
        if not bounded:
            grown = 1.0 + 2.0 * (factor - 1.0)
            ahead = factor * wanted / max(value, 1e-300)
            factor = min(max(grown, min(ahead, 16.0 * factor)), _LARGEST_FACTOR)
            if low >= _LARGEST_FACTOR:
                break
            continue
        if high - low <= 1e-9 * high:
            break
        # regula falsi with the Illinois halving of the side that stands still
        below, above = (wanted - low_value) * low_weight, (high_value - wanted) * high_weight
        share = below / (below + above) if below + above > 0.0 else 0.5
        factor = low + (high - low) * min(max(share, 0.02), 0.98)
    return best


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
    columns: Any, cells: Any, fit: Any, wanted: Any, factors: Any, key: Any, first_cell: Any, real: bool, enough: float
) -> tuple[Any, Any, Any]:
    """Return the new counts by gene (starts, rows, values).

    `columns` are starts, rows and counts of the donors by gene; `cells` their batch, sizes, norm (what a count is
    multiplied by before log1p) and scale (of the whole cell's rate); `factors` (G,) are taken as they are where
    `wanted` is empty, else solved for, beginning with them, and changed in place.
    """
    starts, rows, counts = columns
    batch, sizes, norm, scale = cells
    share, shapes, inflation = fit
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
            place = np.uint64(2) * (np.uint64(number) + np.uint64(num_genes) * (first_cell + np.uint64(cell)))
            u[cell] = uniform(key, place)
            if not real and inflation[number] > 0.0:
                extra_u[cell] = uniform(key, place + np.uint64(1))
            mean[cell] = share[batch[cell], number] * sizes[cell]
        gene = _Gene(mine, theirs, count, u, mean, norm, shapes[number], inflation[number], extra_u, real)
        if len(wanted):
            dither = uniform(key ^ np.uint64(0x5851F42D4C957F2D), np.uint64(number) + np.uint64(num_genes) * first_cell)
            aim = wanted[number] * num_cells + (dither - 0.5) * (1.0 - _UNCHANGED) * unit
            factors[number] = _solve(gene, max(aim, 0.0), unit, factors[number], enough)
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
            drawn = _drawn(gene, gene.rows[entry], factor)
            if drawn > 0:
                rows[used], values[used] = gene.rows[entry], drawn
                used += 1
        return used
    for cell in range(len(gene.norm)):
        drawn = _drawn(gene, cell, factor)
        if drawn > 0:
            rows[used], values[used] = cell, drawn
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
    columns = by_gene.indptr.astype(np.int64), by_gene.indices, by_gene.data
    factors = np.ones(counts.shape[1])
    none = np.empty(0)

    def made(totals: Float, aims: Float, scale: float, enough: float) -> sparse.csr_matrix:
        norm = np.divide(donors.target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
        cells = donors.batch, sizes, norm, scale
        starts, rows, values = _make(
            columns, cells, tuple(fit), aims, factors, key, np.uint64(first_cell), not from_fit, enough
        )
        return sparse.csc_matrix((values, rows, starts), shape=counts.shape).tocsr()

    totals = sizes
    for enough in _ENOUGH:
        cells = made(totals, wanted, 1.0, enough)
        totals = np.asarray(cells.sum(axis=1, dtype=np.float64)).ravel()
    if median_umi is None or not np.median(totals) > 0:
        return cells
    return made(totals, none, median_umi / float(np.median(totals)), 0.0)
