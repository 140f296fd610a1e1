"""Quantiles of counts: a uniform number in, a whole number of a binomial or negative binomial distribution out.

One uniform number makes one count, and a larger mean never makes a smaller count of the same number: so the mean of
many draws rises steadily with their parameter, and can be solved for.
"""

from __future__ import annotations

import math

import numpy as np

from pertcast.stats.groups import compiled

__all__ = ["LARGE_NB", "binomial_quantile", "is_exact_binomial", "negative_binomial_quantile", "normal_quantile"]

# above these means a continuous approximation is used; both are good to a fraction of a count there
_LARGE_BINOMIAL = 12.0
LARGE_NB = 40.0
"""The largest mean of which negative binomial quantiles are exact."""
_MOST_TERMS = 100_000
_NOTHING = 1e-18
_AT_ONCE = 4  # terms between two looks at whether to go on: a processor guesses wrong at every end
_INVERSES = 1.0 / np.maximum(np.arange(128), 1)  # a product is ready sooner than a quotient


@compiled
def normal_quantile(u: float) -> float:
    """Return the standard normal quantile of `u` in (0, 1), to 2e-9 (rational approximation of P. J. Acklam)."""
    if u < 0.02425 or u > 1.0 - 0.02425:
        tail = min(u, 1.0 - u)
        q = math.sqrt(-2.0 * math.log(tail))
        top = -7.784894002430293e-03 * q - 3.223964580411365e-01
        top = ((top * q - 2.400758277161838) * q - 2.549732539343734) * q + 4.374664141464968
        top = top * q + 2.938163982698783
        bottom = (7.784695709041462e-03 * q + 3.224671290700398e-01) * q + 2.445134137142996
        bottom = (bottom * q + 3.754408661907416) * q + 1.0
        return top / bottom if u < 0.5 else -top / bottom
    q = u - 0.5
    r = q * q
    top = (-3.969683028665376e01 * r + 2.209460984245205e02) * r - 2.759285104469687e02
    top = ((top * r + 1.383577518672690e02) * r - 3.066479806614716e01) * r + 2.506628277459239
    bottom = (-5.447609879822406e01 * r + 1.615858368580409e02) * r - 1.556989798598866e02
    bottom = ((bottom * r + 6.680131188771972e01) * r - 1.328068155288572e01) * r + 1.0
    return top * q / bottom


@compiled
def binomial_quantile(u: float, trials: int, chance: float) -> int:
    """Return how many of `trials` succeed, each with probability `chance`, for a uniform `u`."""
    if trials <= 0 or chance <= 0.0:
        return 0
    if chance >= 1.0:
        return trials
    if trials == 1:
        return 1 if u > 1.0 - chance else 0
    if chance > 0.5:  # count the failures, which are the fewer
        return trials - _few(1.0 - u, trials, 1.0 - chance)
    return _few(u, trials, chance)


@compiled
def is_exact_binomial(trials: int) -> bool:
    """Return whether binomial quantiles of so many trials are exact, whatever the chance."""
    return trials <= 2.0 * _LARGE_BINOMIAL


@compiled
def _few(u: float, trials: int, chance: float) -> int:
    mean = trials * chance
    if mean > _LARGE_BINOMIAL:
        near = mean + normal_quantile(u) * math.sqrt(mean * (1.0 - chance))
        return min(max(math.floor(near + 0.5), 0), trials)
    if 1.0 - u >= mean:  # no more than `mean` of the mass is above 0
        return 0
    odds = chance / (1.0 - chance)
    mass = _power(1.0 - chance, trials)
    below, number, passed = mass, 0, int(u > mass)
    while u > below and number < trials:
        for _ in range(_AT_ONCE):
            mass *= odds * max(trials - number, 0) * _inverse(number + 1)
            number += 1
            below += mass
            passed += u > below
    return min(passed, trials)


@compiled
def _power(base: float, exponent: int) -> float:
    """Return a whole power; of the few trials that most cells have, faster than by logarithms."""
    if exponent > 32:
        return math.exp(exponent * math.log(base))
    power = 1.0
    while exponent > 0:
        if exponent & 1:
            power *= base
        base *= base
        exponent >>= 1
    return power


@compiled
def _inverse(number: int) -> float:
    return _INVERSES[number] if number < len(_INVERSES) else 1.0 / number


@compiled
def negative_binomial_quantile(u: float, mean: float, shape: float) -> int:
    """Return a count of a negative binomial with variance ``mean + mean ** 2 / shape``, for a uniform `u`."""
    if mean <= 0.0 or 1.0 - u >= mean:  # no more than `mean` of the mass is above 0
        return 0
    if mean > LARGE_NB:
        # a gamma variable of the same mean and variance, by Wilson and Hilferty
        order = mean * shape / (mean + shape)
        root = 1.0 - 1.0 / (9.0 * order) + normal_quantile(u) / (3.0 * math.sqrt(order))
        return math.floor(mean * max(root, 0.0) ** 3 + 0.5)
    share = mean / (mean + shape)
    ratio = mean / shape
    # the plain logarithm takes half the time, and is as good where one and the ratio are of like size
    mass = math.exp(-shape * (math.log(1.0 + ratio) if ratio > 0.01 else math.log1p(ratio)))
    below, number, passed = mass, 0, int(u > mass)
    while u > below and number < _MOST_TERMS and (mass >= _NOTHING or number <= mean):
        for _ in range(_AT_ONCE):
            mass *= share * (shape + number) * _inverse(number + 1)
            number += 1
            below += mass
            passed += u > below
    return passed
