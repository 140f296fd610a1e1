"""The factor of a gene that meets a wanted pseudobulk with the counts that are drawn at it.

A cell's count never falls where the factor rises: a cell that has one count at both ends of the bracket has it between
them, too, and is not drawn again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pertcast.generate.cells.gene import Law, drawn, is_steady
from pertcast.stats.groups import compiled

__all__ = ["Search", "new_search", "solve"]

_MOST_STEPS = 32
_FIRST_STEPS = 4
_LARGEST_LOG = math.log(1e9)
_LONGEST_STEP = math.log(16.0)
_SHORT_STEP = 0.1
_NEVER = np.int64(-1)


class Search(NamedTuple):
    """Room to search in: what is known of each cell at the ends of the bracket and at the factor tried last.

    Attributes
    ----------
    low, high
        (n,) counts at the bracket's ends, -1 where it has no upper end yet.
    now
        (n,) counts at the factor tried last.
    value
        (n,) their log1p(normalised).
    cells
        (n,) the cells that are not settled come first.
    """

    low: Any
    high: Any
    now: Any
    value: Any
    cells: Any


@compiled
def new_search(num_cells: int) -> Any:
    """Return room for the search of genes of so many cells."""
    return Search(
        np.empty(num_cells, dtype=np.int64),
        np.empty(num_cells, dtype=np.int64),
        np.empty(num_cells, dtype=np.int64),
        np.empty(num_cells),
        np.empty(num_cells, dtype=np.int64),
    )


@compiled
def _begin(law: Law, gene: Any, search: Any, falls: bool) -> int:
    """Return how many cells there are to draw; those without a count stay so where the factor is below 1."""
    rows, count = gene.rows, gene.count
    low, high, now, value, cells = search
    number = len(rows) if law.real and falls else len(count)
    for place in range(number):
        cell = rows[place] if law.real and falls else place
        cells[place] = cell
        low[cell], high[cell] = (0, count[cell]) if law.real and falls else (count[cell] if law.real else 0, _NEVER)
        now[cell], value[cell] = 0, 0.0
    return number


@compiled
def _try(law: Law, gene: Any, search: Any, number: int, factor: float) -> tuple[float, float]:
    """Draw the cells that are not settled; return the sum of their values and of the squares."""
    u, count, mean, norm = gene.u, gene.count, gene.mean, gene.norm
    now, value, cells = search.now, search.value, search.cells
    total, square = 0.0, 0.0
    for place in range(number):
        cell = cells[place]
        new = drawn(law, factor, u[cell], count[cell], mean[cell])
        if new != now[cell]:
            now[cell], value[cell] = new, math.log(1.0 + new * norm[cell])
        total += value[cell]
        square += value[cell] * value[cell]
    return total, square


@compiled
def _settle(law: Law, gene: Any, search: Any, number: int, is_low: bool, top: float) -> tuple[int, float, float]:
    """Make what was tried last an end of the bracket; return how many cells are left, and what the others add."""
    count, mean = gene.count, gene.mean
    low, high, now, value, cells = search
    left, total, square = 0, 0.0, 0.0
    for place in range(number):
        cell = cells[place]
        if is_low:
            low[cell] = now[cell]
        else:
            high[cell] = now[cell]
        if low[cell] == high[cell] and is_steady(law, top, count[cell], mean[cell]):
            total += value[cell]
            square += value[cell] * value[cell]
        else:
            cells[left] = cell
            left += 1
    return left, total, square


@compiled
def solve(
    law: Law, gene: Any, search: Any, now: float, wanted: float, unit: float, start: tuple[float, float], enough: float
) -> tuple[float, bool]:
    """Return the factor at which the sum of log1p(normalised) is nearest to `wanted`.

    Parameters
    ----------
    law, gene, search
        The gene, and room.
    now
        The donors' own sum; of no account where counts are drawn from the fit.
    wanted, unit
        The sum to meet, and one count's worth of it.
    start
        The factor to begin with, and how fast the sum rises there with the logarithm of the factor.
    enough
        How near the sum must come, in standard errors of it, or half a unit.

    Returns
    -------
    The factor, and whether ``search.now`` holds the counts at it.
    """
    if law.real and abs(wanted - now) <= 0.5 * unit:
        return 1.0, False
    if wanted <= 0.0:
        return 0.0, False
    num_cells = len(gene.norm)
    guess, slope = start
    falls = law.real and wanted < now
    number = _begin(law, gene, search, falls)
    low, high = -np.inf, np.inf
    best, best_miss = 1.0, np.inf
    if law.real:
        best_miss = abs(wanted - now)
        low, high = (low, 0.0) if falls else (0.0, high)
    settled, settled_square = 0.0, 0.0
    at = min(math.log(max(guess, 1e-9)), _LARGEST_LOG)
    if not low < at < high:
        at = -0.01 if falls else 0.01
    before, value_before = 0.0, 0.0
    for step in range(_MOST_STEPS):
        factor = math.exp(at)
        value, square = _try(law, gene, search, number, factor)
        value, square = value + settled, square + settled_square
        miss = value - wanted
        variance = max(square / num_cells - (value / num_cells) ** 2, 0.0)
        if abs(miss) <= max(0.5 * unit, enough * math.sqrt(variance * num_cells)):
            return factor, True
        if abs(miss) < best_miss:
            best, best_miss = factor, abs(miss)
        if miss < 0.0:
            low = at
        else:
            high = at
        number, more, more_square = _settle(law, gene, search, number, miss < 0.0, math.exp(min(high, _LARGEST_LOG)))
        settled, settled_square = settled + more, settled_square + more_square
        if number == 0 or high - low <= 1e-9 or low >= _LARGEST_LOG:
            break
        if number == 1 and search.high[search.cells[0]] - search.low[search.cells[0]] == 1:
            break  # there is no sum between those of the two ends
        rise = slope
        if step > 0 and value != value_before and at != before:
            rise = (value - value_before) / (at - before)
        before, value_before = at, value
        at = _next(at, miss, rise, low, high, step)
    return best, False


@compiled
def _next(at: float, miss: float, rise: float, low: float, high: float, step: int) -> float:
    """Return the logarithm of the factor to try next: a secant's, and where that leads nowhere the bracket's middle."""
    bounded = high - low < np.inf
    ahead = -miss / rise if rise > 0.0 else np.inf
    if step >= _FIRST_STEPS and not bounded:  # the rise is not what it seemed
        reach = _SHORT_STEP * 2.0 ** (step - _FIRST_STEPS)
        ahead = max(ahead, reach) if miss < 0.0 else min(ahead, -reach)
    ahead = at + min(max(ahead, -_LONGEST_STEP), _LONGEST_STEP)
    if low < ahead < high and (step < _FIRST_STEPS or not bounded):
        return min(ahead, _LARGEST_LOG)
    if bounded:
        return 0.5 * (low + high)
    return at + _LONGEST_STEP if miss < 0.0 else at - _LONGEST_STEP
