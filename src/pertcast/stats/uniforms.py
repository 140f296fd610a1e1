"""Uniform draws inside compiled loops: the n-th number of a key is a function of both, so any order gives the same.

The generator is SplitMix64 read by its counter; keys come from :func:`pertcast.stats.draws.key_hash`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pertcast.stats.draws import key_hash
from pertcast.stats.groups import compiled

__all__ = ["uniform", "uniform_key"]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ONE, _11, _27, _30, _31 = (np.uint64(number) for number in (1, 11, 27, 30, 31))
_UNIT = 1.0 / (1 << 53)


def uniform_key(seed: int, *key: str | int) -> np.uint64:
    """Return the key of a stream of uniform numbers, as :func:`uniform` takes it.

    Examples
    --------
    >>> int(uniform_key(0, "cells", "H1")) == int(uniform_key(0, "cells", "H1"))
    True
    """
    return np.uint64(key_hash(seed, *key) & 0xFFFFFFFFFFFFFFFF)


@compiled
def uniform(key: Any, counter: Any) -> float:
    """Return number `counter` of a stream, in (0, 1); for use in compiled functions.

    Parameters
    ----------
    key, counter
        Both uint64.
    """
    state = key + (counter + _ONE) * _STEP
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    state = state ^ (state >> _31)
    return (float(state >> _11) + 0.5) * _UNIT
