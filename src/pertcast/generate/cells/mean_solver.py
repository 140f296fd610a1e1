"""Find the factor at which a gene's counts have a wanted pseudobulk.

`expected_sum` gives the expected mean of log1p(normalised) at a factor in closed form. It uses one typical cell and one
rate for batches of like rates, and approximates a wide distribution by a gamma of the same mean and variance. `solve`
starts from that factor and searches among actual draws.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.generate.cells.gene_counts import Law, aim_at, drawn, is_steady, mean_unit, more, sum_of
from pertcast.stats.groups import compiled

SMALL_COUNTS = 64
"""Donors of fewer counts are taken together."""
_MOST_TERMS = 256
_WIDE = 15.0
_NEARLY_ALL = 0.9999
_MOST_STEPS = 16
_LARGEST_LOG = math.log(1e9)
_LONGEST_STEP = 3.0


class Typical(NamedTuple):
    """One cell that represents all of them."""

    logs: NDArray[np.float64]  # log1p(normalised) of each small count
    norm: float  # What a count is multiplied by before log1p
    size: float  # Its counts in all


class Tally(NamedTuple):
    """A gene's donors, counted."""

    cells: Any  # (classes, SMALL_COUNTS) how many donors there are of each class of batches and count
    rate: Any  # (classes,) what the fit expects of the typical cell, in a batch of the class
    large: Any  # The counts of all donors that have more; of no account where counts are drawn from the fit
    mean: float  # What the fit expects of the typical cell, in the mean of all batches


def typical_cell(sizes: NDArray[np.float64], target_sum: float, *, real: bool) -> Typical:
    """Return the cell that represents cells of these sizes."""
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
    """Return the expected logarithm of a gamma variable with the mean and variance of 1 + normalised."""
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
    """Return the expected value of `first` counts plus a negative binomial number of counts."""
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
    """Return the expected sum over cells of log1p(normalised) at a factor."""
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
    """Return the factor at which `wanted` is expected, and the slope of the sum there."""
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


_MOST_FACTOR_STEPS = 32
_FIRST_STEPS = 4
_LONGEST_FACTOR_STEP = math.log(16.0)
_SHORT_STEP = 0.1
_NEVER = np.int64(-1)


class Search(NamedTuple):
    """Work arrays: what is known of each cell at the bracket's ends and at the last factor."""

    low: Any  # (n,) counts at the bracket's ends, -1 if it has no upper end yet
    high: Any
    now: Any  # (n,) counts at the factor tried last
    value: Any  # (n,) their log1p(normalised)
    cells: Any  # (n,) the cells that are not settled come first


@compiled
def new_search(num_cells: int) -> Any:
    """Return work arrays for so many cells."""
    return Search(
        np.empty(num_cells, dtype=np.int64),
        np.empty(num_cells, dtype=np.int64),
        np.empty(num_cells, dtype=np.int64),
        np.empty(num_cells),
        np.empty(num_cells, dtype=np.int64),
    )


@compiled
def _begin(law: Law, gene: Any, search: Any, falls: bool) -> int:
    """Return the number of cells to draw; those without a count stay 0 below a factor of 1."""
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
    """Make the last factor an end of the bracket; return the number of open cells, and the others' sum."""
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
    """Return the factor whose sum of log1p(normalised) is nearest to `wanted`."""
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
    for step in range(_MOST_FACTOR_STEPS):
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
    """Return the logarithm of the next factor: a secant step, or else the bracket's middle."""
    bounded = high - low < np.inf
    ahead = -miss / rise if rise > 0.0 else np.inf
    if step >= _FIRST_STEPS and not bounded:  # the rise is not what it seemed
        reach = _SHORT_STEP * 2.0 ** (step - _FIRST_STEPS)
        ahead = max(ahead, reach) if miss < 0.0 else min(ahead, -reach)
    ahead = at + min(max(ahead, -_LONGEST_FACTOR_STEP), _LONGEST_FACTOR_STEP)
    if low < ahead < high and (step < _FIRST_STEPS or not bounded):
        return min(ahead, _LARGEST_LOG)
    if bounded:
        return 0.5 * (low + high)
    return at + _LONGEST_FACTOR_STEP if miss < 0.0 else at - _LONGEST_FACTOR_STEP


_MOST_CLASSES = 8


@compiled
def expect_totals(band: Any, cells: Any, typical: Any, factors: Any, slopes: Any, totals: Any) -> None:
    """Set each gene's factor, and add the expected counts of each cell to `totals`."""
    batch, sizes, norm = cells
    num_cells, num_batches, unit = len(batch), len(band.share), mean_unit(norm)
    in_batch = np.zeros(num_batches, dtype=np.int64)
    for cell in range(num_cells):
        in_batch[batch[cell]] += 1
    class_of, large = np.empty(num_batches, dtype=np.int64), np.empty(num_cells, dtype=np.int64)
    counted, rate = np.empty((_MOST_CLASSES, SMALL_COUNTS), dtype=np.int64), np.empty(_MOST_CLASSES)
    count = np.zeros(num_cells)
    for number in range(len(band.starts) - 1):
        rows = band.rows[band.starts[number] : band.starts[number + 1]]
        counts = band.counts[band.starts[number] : band.starts[number + 1]]
        now = sum_of(rows, counts, norm) if band.real else 0.0
        aim = aim_at(band, number, num_cells, unit)
        if band.real and abs(aim - now) <= 0.5 * unit:
            factors[number], slopes[number] = 1.0, max(aim, unit)
        elif aim <= 0.0:
            factors[number], slopes[number] = 0.0, unit
        else:
            share = band.share[:, number] * typical.size
            classes = _classes(share, in_batch, band.real and aim < now, class_of, rate)
            mean = _count_classes(share, in_batch, class_of, classes, counted, rate)
            used = 0
            if band.real:
                used = _count_donors(rows, counts, batch, class_of, counted, large)
            law = Law(band.shape[number], band.inflation[number], band.real)
            tally = Tally(counted[:classes], rate[:classes], large[:used], mean)
            factors[number], slopes[number] = find_factor(law, tally, typical, now, aim, unit)
        _add(band, number, (rows, counts), (batch, sizes), factors[number], count, totals)


@compiled
def _classes(rates: Any, in_batch: Any, is_one: bool, class_of: Any, rate: Any) -> int:
    """Group batches by their rate, a factor of 2 wide, or all into one; return the number of classes."""
    lowest, classes = np.inf, 1
    for one in range(len(rates)):
        if in_batch[one] > 0:
            lowest = min(lowest, rates[one])
    for one in range(len(rates)):
        class_of[one] = 0
        if in_batch[one] > 0 and not is_one:
            class_of[one] = min(int(math.log2(max(rates[one] / lowest, 1.0))), len(rate) - 1)
            classes = max(classes, class_of[one] + 1)
    return classes


@compiled
def _count_classes(rates: Any, in_batch: Any, class_of: Any, classes: int, counted: Any, rate: Any) -> float:
    """Count the cells of each class and set its mean rate; return the overall mean rate."""
    counted[:classes] = 0
    rate[:classes] = 0.0
    mean = 0.0
    for one in range(len(rates)):
        counted[class_of[one], 0] += in_batch[one]
        rate[class_of[one]] += rates[one] * in_batch[one]
        mean += rates[one] * in_batch[one]
    for one in range(classes):
        rate[one] /= max(counted[one, 0], 1)
    return mean / in_batch.sum()


@compiled
def _count_donors(rows: Any, counts: Any, batch: Any, class_of: Any, counted: Any, large: Any) -> int:
    """Move donors with counts to their classes; return how many have more than are counted."""
    used = 0
    for entry in range(len(rows)):
        one, whole = class_of[batch[rows[entry]]], np.int64(counts[entry])
        counted[one, 0] -= 1
        if whole < SMALL_COUNTS:
            counted[one, whole] += 1
        else:
            large[used] = whole
            used += 1
    return used


@compiled
def _add(band: Any, number: int, donors: Any, cells: Any, factor: float, count: Any, totals: Any) -> None:
    rows, counts = donors
    batch, sizes = cells
    if not band.real:
        for cell in range(len(batch)):
            totals[cell] += factor * band.share[batch[cell], number] * sizes[cell]
        return
    if factor <= 1.0:
        for entry in range(len(rows)):
            totals[rows[entry]] += factor * counts[entry]
        return
    shape = band.shape[number]
    for entry in range(len(rows)):
        count[rows[entry]] = counts[entry]
    for cell in range(len(batch)):
        rate = band.share[batch[cell], number] * sizes[cell]
        totals[cell] += count[cell] + (factor - 1.0) * (shape + count[cell]) * rate / (shape + rate)
    for entry in range(len(rows)):
        count[rows[entry]] = 0.0
