"""Paired bootstrap intervals over targets and seeds.

Legend of shapes: S seeds, U units (a target in a context), R resamples. A resample draws targets with replacement and,
independently, seeds (a hierarchical bootstrap with crossed levels: Owen, "The pigeonhole bootstrap", 2007). Units of
one target are drawn together. All candidates share the draws, so the effect of a hard target or a lucky seed cancels in
a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.stats.draws import generator

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A value and its percentile interval; all NaN if there is no number."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


class Resamples(NamedTuple):
    """How often each seed and unit is drawn: (R, S) and (R, U) float64."""

    seeds_RS: Floats
    units_RU: Floats


def draw_resamples(targets: Sequence[str], *, num_seeds: int, num: int = 4000) -> Resamples:
    """Draw targets and seeds with replacement.

    >>> drawn = draw_resamples(["A", "A", "B"], num_seeds=2, num=100)
    >>> drawn.units_RU.shape, bool((drawn.units_RU[:, 0] == drawn.units_RU[:, 1]).all())
    ((100, 3), True)
    """
    names, place = np.unique(np.asarray(targets, dtype=str), return_inverse=True)
    counts_RN = _counts(len(names), num, generator(0, "bootstrap", "targets"))
    return Resamples(_counts(num_seeds, num, generator(0, "bootstrap", "seeds")), counts_RN[:, place])


def _counts(size: int, num: int, random: np.random.Generator) -> Floats:
    return random.multinomial(size, np.full(size, 1 / size), size=num).astype(np.float64)


def resampled_means(values_SU: Floats, resamples: Resamples) -> Floats:
    """Return the weighted mean of each resample, (R,), without NaN values."""
    values_SU = np.broadcast_to(values_SU, (resamples.seeds_RS.shape[1], values_SU.shape[1]))
    there_SU = ~np.isnan(values_SU)
    sums_R = ((resamples.seeds_RS @ np.where(there_SU, values_SU, 0.0)) * resamples.units_RU).sum(axis=1)
    weights_R = ((resamples.seeds_RS @ there_SU.astype(np.float64)) * resamples.units_RU).sum(axis=1)
    return np.divide(sums_R, weights_R, out=np.full(len(sums_R), np.nan), where=weights_R > 0)


def interval(value: float, resampled_R: Floats, *, level: float = 0.95) -> Interval:
    """Return a value with the percentiles of its resamples.

    >>> interval(2.0, np.arange(101.0), level=0.5)
    Interval(value=2.0, low=25.0, high=75.0)
    """
    known = resampled_R[np.isfinite(resampled_R)]
    if not len(known) or not np.isfinite(value):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
