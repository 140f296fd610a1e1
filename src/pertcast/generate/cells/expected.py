"""What a gene's pseudobulk is expected to be at a factor, without a draw: in closed form over its donors' counts.

One cell stands for all, and one rate for batches of like rates; a wide distribution of counts is taken for a gamma
variable's of the same mean and variance. So what is found is a little off; the search among draws begins there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.generate.cells.gene import Law, more
from pertcast.stats.groups import compiled

__all__ = ["SMALL_COUNTS", "Tally", "Typical", "expected_sum", "find_factor", "typical_cell"]

SMALL_COUNTS = 64
"""Donors of fewer counts are taken together."""
_MOST_TERMS = 256
_WIDE = 15.0
_NEARLY_ALL = 0.9999
_MOST_STEPS = 16
_LARGEST_LOG = math.log(1e9)
_LONGEST_STEP = 3.0


class Typical(NamedTuple):
    """A cell that stands for all of them.

    Attributes
    ----------
    logs
        log1p(normalised) of each small count.
    norm
        What a count is multiplied by before log1p.
    size
        Its counts in all.
    """

    logs: NDArray[np.float64]
    norm: float
    size: float


class Tally(NamedTuple):
    """A gene's donors, counted.

    Attributes
    ----------
    cells
        (classes, SMALL_COUNTS) how many donors there are of each class of batches and count.
    rate
        (classes,) what the fit expects of the typical cell, in a batch of the class.
    large
        The counts of all donors that have more; of no account where counts are drawn from the fit.
    mean
        What the fit expects of the typical cell, in the mean of all batches.
    """

    cells: Any
    rate: Any
    large: Any
    mean: float


def typical_cell(sizes: NDArray[np.float64], target_sum: float, *, real: bool) -> Typical:
    """Return the cell that stands for cells of these sizes, (n,).

    Where donors' counts are re-weighted, one of the mean size, in which a single count is worth what a donor's is in
    the mean. Where counts are drawn from the fit, one in which genes have the mean that they have over cells, both
    those seen everywhere (``share * target_sum``) and those seen rarely (``share * size * log1p(target_sum / size)``).
    """
    there = sizes[sizes > 0] if (sizes > 0).any() else np.full(1, target_sum)
    norms = target_sum / there
    if real:
        norm, size = float(np.expm1(np.average(np.log1p(norms), weights=there))), float(there.mean())
    else:
        some = np.linspace(norms.min(), norms.max(), 1024)
        norm = float(np.interp(-np.mean(np.log1p(norms) / norms), -np.log1p(some) / some, some))
        size = target_sum / norm
    return Typical(np.log1p(norm * np.arange(SMALL_COUNTS + _MOST_TERMS)), norm, size)


@compiled
def _of_wide(mean: float, variance: float, norm: float) -> float:
    """Return what is expected of a gamma variable's logarithm, of the mean and variance that 1 + normalised has."""
    centre = 1.0 + norm * mean
    order = centre * centre / max(norm * norm * variance, 1e-9)
    ahead = order + 1.0
    bend = math.log(ahead / order) - 1.0 / order - 0.5 / ahead - 1.0 / (12.0 * ahead * ahead)
    return max(math.log(centre) + bend, 0.0)


@compiled
def _of_binomial(trials: int, chance: float, logs: Any, norm: float) -> float:
    mean = trials * chance
    if mean > _WIDE or trials >= SMALL_COUNTS:
        return _of_wide(mean, mean * (1.0 - chance), norm)
    odds = chance / (1.0 - chance)
    mass = math.exp(trials * math.log1p(-chance))
    total = 0.0
    for number in range(trials):
        mass *= odds * (trials - number) / (number + 1.0)
        total += mass * logs[number + 1]
    return total


@compiled
def _of_negative_binomial(first: int, mean: float, shape: float, logs: Any, norm: float) -> float:
    """Return what is expected of `first` counts and a negative binomial number of others."""
    if mean > _WIDE or first >= SMALL_COUNTS:
        return _of_wide(first + mean, mean + mean * mean / shape, norm)
    share = mean / (mean + shape)
    mass = math.exp(-shape * math.log1p(mean / shape))
    below, total, number = mass, mass * logs[first], 0
    while below < _NEARLY_ALL and number < _MOST_TERMS - 1:
        mass *= share * (shape + number) / (number + 1.0)
        number += 1
        below += mass
        total += mass * logs[first + number]
    return total + max(1.0 - below, 0.0) * logs[first + number]


@compiled
def _of_donor(law: Law, count: int, rate: float, factor: float, logs: Any, norm: float) -> float:
    if factor == 1.0:
        return math.log(1.0 + norm * count)
    if factor < 1.0:
        return _of_binomial(count, factor, logs, norm)
    return _of_negative_binomial(count, more(law, count, rate, factor), law.shape + count, logs, norm)


@compiled
def expected_sum(law: Law, tally: Any, typical: Any, factor: float) -> float:
    """Return the sum over cells of log1p(normalised) that is expected at a factor."""
    cells, rates, large, logs, norm = tally.cells, tally.rate, tally.large, typical.logs, typical.norm
    total, kept = 0.0, 1.0 - law.inflation
    for one in range(len(rates)):
        if not law.real:
            each = _of_negative_binomial(0, factor * rates[one] / kept, law.shape, logs, norm)
            total += cells[one, 0] * kept * each
            continue
        for count in range(1 if factor <= 1.0 else 0, SMALL_COUNTS):
            if cells[one, count] > 0:
                total += cells[one, count] * _of_donor(law, count, rates[one], factor, logs, norm)
    if law.real:
        for place in range(len(large)):
            total += _of_donor(law, large[place], tally.mean, factor, logs, norm)
    return total


@compiled
def find_factor(law: Law, tally: Any, typical: Any, now: float, wanted: float, unit: float) -> tuple[float, float]:
    """Return the factor at which `wanted` is expected, and how fast the sum rises there with the factor's logarithm.

    `now` is what the donors' sum really is: what is expected at a factor of 1 is off by as much elsewhere, in
    proportion below 1 and by the same amount above. `unit` is one count's worth.
    """
    at_one = expected_sum(law, tally, typical, 1.0)
    if law.real:
        wanted = wanted * at_one / now if wanted < now else wanted + at_one - now
    wanted = max(wanted, 0.01 * unit)
    low, high = -_LARGEST_LOG, _LARGEST_LOG
    before, log_before = 0.0, math.log(max(at_one, 0.01 * unit))
    rise, value = 1.0, at_one
    at = min(max(math.log(wanted) - log_before, low), high)
    for _ in range(_MOST_STEPS):
        value = expected_sum(law, tally, typical, math.exp(at))
        log_value = math.log(max(value, 1e-300))
        if abs(at - before) > 1e-6:
            rise = max((log_value - log_before) / (at - before), 1e-3)
        if abs(value - wanted) <= 0.1 * unit + 5e-4 * wanted:
            break
        if value < wanted:
            low = at
        else:
            high = at
        before, log_before = at, log_value
        at += min(max((math.log(wanted) - log_value) / rise, -_LONGEST_STEP), _LONGEST_STEP)
        if not low < at < high:
            at = 0.5 * (low + high)
    return math.exp(at), rise * max(value, 1e-3 * unit)
