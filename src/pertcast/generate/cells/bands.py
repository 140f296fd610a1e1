"""A band of genes of re-weighted control cells: what is to be met, and the counts that are drawn.

No count depends on which other genes a band has. Legend of shapes: n cells, B batches, g genes of the band.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pertcast.generate.cells.factor import new_search, solve
from pertcast.generate.cells.gene import ALWAYS_ZERO, Gene, Law, drawn
from pertcast.stats.groups import compiled
from pertcast.stats.uniforms import uniform

__all__ = ["Band", "Cells", "aim_at", "make", "mean_unit", "sum_of"]

_UNCHANGED = 1e-3
_DITHER = np.uint64(0x5851F42D4C957F2D)


class Cells(NamedTuple):
    """What is known of every cell: its batch, its donor's counts in all, what a count is multiplied by before log1p."""

    batch: Any
    sizes: Any
    norm: Any


class Band(NamedTuple):
    """The donors' counts and the fit of some genes, and where their draws stand in the stream.

    Attributes
    ----------
    starts, rows, counts
        Donors' counts by gene: those of gene number i are ``counts[starts[i]:starts[i + 1]]``.
    share, shape, inflation
        (B, g), (g,), (g,) the fit.
    wanted
        (g,) the pseudobulk to meet.
    key, first_cell, first_gene, all_genes
        The key of the draws, the number of the first cell, of the first gene, and of the genes of all bands.
    real
        Whether donors' own counts are re-weighted; otherwise all are drawn from the fit.
    """

    starts: Any
    rows: Any
    counts: Any
    share: Any
    shape: Any
    inflation: Any
    wanted: Any
    key: Any
    first_cell: Any
    first_gene: Any
    all_genes: Any
    real: bool


@compiled
def aim_at(band: Any, number: int, num_cells: int, unit: float) -> float:
    """Return the sum to meet; what is less than a count of one cell is rounded at random.

    What rounds to no count is 0 where counts are drawn from the fit: a count of a deep cell is worth less than most,
    and would be near enough, too.
    """
    draw = band.first_gene + np.uint64(number) + band.all_genes * band.first_cell
    dither = uniform(band.key ^ _DITHER, draw)
    aim: float = band.wanted[number] * num_cells + (dither - 0.5) * (1.0 - _UNCHANGED) * unit
    return max(aim, 0.0) if band.real or aim > 0.5 * unit else 0.0


@compiled
def sum_of(rows: Any, counts: Any, norm: Any) -> float:
    """Return the sum of log1p(normalised) of a gene's counts."""
    total = 0.0
    for entry in range(len(rows)):
        total += math.log(1.0 + counts[entry] * norm[rows[entry]])
    return total


@compiled
def mean_unit(norm: Any) -> float:
    """Return what one count of a cell adds to the sum, in the mean."""
    total = 0.0
    for cell in range(len(norm)):
        total += math.log1p(norm[cell])
    return total / len(norm)


@compiled
def make(band: Any, cells: Any, factors: Any, slopes: Any, enough: float) -> tuple[Any, Any, Any]:
    """Return the new counts of a band (starts, rows, values), rows ascending within a gene.

    Factors are solved for, as near as `enough` says, beginning with `factors`, which change in place.
    """
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
    """Set the uniform numbers of a gene, and what the fit expects of each cell."""
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
