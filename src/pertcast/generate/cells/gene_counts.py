"""The counts of one gene over cells: draws at a factor, and their normalised sum."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pertcast.stats.counts import LARGE_NB, binomial_quantile, is_exact_binomial, negative_binomial_quantile
from pertcast.stats.draws import uniform
from pertcast.stats.groups import compiled

ALWAYS_ZERO = -1.0
"""In place of a uniform number: the cell has one of the extra zeros."""


class Law(NamedTuple):
    """The distribution of a gene's counts."""

    shape: float  # The fit's
    inflation: float
    real: bool  # Whether donors' own counts are re-weighted; otherwise all are drawn from the fit


class Gene(NamedTuple):
    """One gene: its donors' counts, and the known values of every cell."""

    rows: Any  # Cells whose donor has some, ascending
    count: Any  # (n,) int64, what the donor of each cell has
    u: Any  # (n,) uniform numbers, or `ALWAYS_ZERO`
    mean: Any  # (n,) what the fit expects of a control cell of this batch and size
    norm: Any  # (n,) what a count is multiplied by before log1p


@compiled
def more(law: Law, count: int, mean: float, factor: float) -> float:
    """Return the mean of the counts that are added to a donor's at a factor above 1."""
    return (factor - 1.0) * (law.shape + count) * mean / (law.shape + mean)


@compiled
def drawn(law: Law, factor: float, u: float, count: int, mean: float) -> Any:
    """Return a cell's new count at a factor, from the same uniform number `u` at every factor."""
    if not law.real:
        if u == ALWAYS_ZERO:
            return 0
        return negative_binomial_quantile(u, factor * mean / (1.0 - law.inflation), law.shape)
    if factor < 1.0:
        return binomial_quantile(u, count, factor)
    if factor == 1.0:
        return count
    return count + negative_binomial_quantile(u, more(law, count, mean, factor), law.shape + count)


@compiled
def is_steady(law: Law, factor: float, count: int, mean: float) -> bool:
    """Return whether a cell's count never falls while the factor rises to this one."""
    if not law.real:
        return factor * mean / (1.0 - law.inflation) <= LARGE_NB
    if factor <= 1.0:
        return is_exact_binomial(count)
    return more(law, count, mean, factor) <= LARGE_NB


@compiled
def aim_at(band: Any, number: int, num_cells: int, unit: float) -> float:
    """Return the sum to reach; less than one count of one cell is rounded at random."""
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
    """Return the mean of what one count of a cell adds to the sum."""
    total = 0.0
    for cell in range(len(norm)):
        total += math.log1p(norm[cell])
    return total / len(norm)


_UNCHANGED = 1e-3


_DITHER = np.uint64(0x5851F42D4C957F2D)
