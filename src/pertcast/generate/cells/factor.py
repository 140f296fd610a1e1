"""One gene of re-weighted control cells: its new counts at a factor, and the factor that meets a wanted pseudobulk."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from pertcast.stats.groups import compiled
from pertcast.stats.quantiles import binomial_quantile, negative_binomial_quantile

__all__ = ["Gene", "drawn", "solve"]

_MOST_STEPS = 24
_LARGEST_FACTOR = 1e9


class Gene(NamedTuple):
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
def drawn(gene: Any, cell: int, factor: float) -> Any:
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
def moments(gene: Any, factor: float) -> tuple[float, float]:
    """Return the sum and the sum of squares of log1p(normalised) at a factor."""
    total, square = 0.0, 0.0
    if gene.real and factor <= 1.0:
        for entry in range(len(gene.rows)):
            cell = gene.rows[entry]
            count = drawn(gene, cell, factor)
            if count > 0:
                value = math.log1p(count * gene.norm[cell])
                total += value
                square += value * value
        return total, square
    for cell in range(len(gene.norm)):
        count = drawn(gene, cell, factor)
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
def solve(gene: Any, wanted: float, unit: float, guess: float, enough: float) -> float:
    """Return the factor at which the sum of log1p(normalised) is nearest to `wanted`; `unit` is one count's worth."""
    now, _ = moments(gene, 1.0)
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
        value, square = moments(gene, factor)
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
