"""The factors of a band of genes, and the counts of each cell in all, that are expected before anything is drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pertcast.generate.cells.bands import aim_at, mean_unit, sum_of
from pertcast.generate.cells.expected import SMALL_COUNTS, Tally, find_factor
from pertcast.generate.cells.gene import Law
from pertcast.stats.groups import compiled

__all__ = ["expect_totals"]

_MOST_CLASSES = 8


@compiled
def expect_totals(band: Any, cells: Any, typical: Any, factors: Any, slopes: Any, totals: Any) -> None:
    """Set each gene's factor, and add what is expected of each cell then to `totals`.

    Parameters
    ----------
    band, cells
        Of :mod:`pertcast.generate.cells.bands`.
    typical
        Of :func:`pertcast.generate.cells.expected.typical_cell`.
    factors, slopes
        (g,) and (g,), where the search among draws begins; written.
    totals
        (n,) added to.
    """
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
    """Put batches into classes by their rate, a factor of 2 wide, or all into one; return how many there are."""
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
    """Count the cells of each class, as if none had a count, and set its mean rate; return that of all cells."""
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
    """Move donors with counts to where they belong; return how many have more than are counted."""
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
