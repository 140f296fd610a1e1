"""One gene of re-weighted control cells: what is known of it in every cell, and a cell's new count at a factor.

Compiled loops take arrays out of a :class:`Gene` before they begin and hand numbers on: a record of arrays that goes
through a call has its owners counted there, which takes as long as the draw.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pertcast.stats.groups import compiled
from pertcast.stats.quantiles import LARGE_NB, binomial_quantile, is_exact_binomial, negative_binomial_quantile

__all__ = ["ALWAYS_ZERO", "Gene", "Law", "drawn", "is_steady", "more"]

ALWAYS_ZERO = -1.0
"""In place of a uniform number: the cell has one of the extra zeros."""


class Law(NamedTuple):
    """How a gene's counts are distributed.

    Attributes
    ----------
    shape, inflation
        The fit's.
    real
        Whether donors' own counts are re-weighted; otherwise all are drawn from the fit.
    """

    shape: float
    inflation: float
    real: bool


class Gene(NamedTuple):
    """One gene: its donors' counts, and what is known of every cell.

    Attributes
    ----------
    rows
        Cells whose donor has some, ascending.
    count
        (n,) int64, what the donor of each cell has.
    u
        (n,) uniform numbers, or `ALWAYS_ZERO`.
    mean
        (n,) what the fit expects of a control cell of this batch and size.
    norm
        (n,) what a count is multiplied by before log1p.
    """

    rows: Any
    count: Any
    u: Any
    mean: Any
    norm: Any


@compiled
def more(law: Law, count: int, mean: float, factor: float) -> float:
    """Return the mean of what is added to a donor's count at a factor above 1."""
    return (factor - 1.0) * (law.shape + count) * mean / (law.shape + mean)


@compiled
def drawn(law: Law, factor: float, u: float, count: int, mean: float) -> Any:
    """Return a cell's new count at a factor; the same uniform number `u` at every factor."""
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
    """Return whether a cell's count never falls where the factor rises up to this one.

    So it is wherever quantiles are exact; where they are approximated they may fall by a count.
    """
    if not law.real:
        return factor * mean / (1.0 - law.inflation) <= LARGE_NB
    if factor <= 1.0:
        return is_exact_binomial(count)
    return more(law, count, mean, factor) <= LARGE_NB
