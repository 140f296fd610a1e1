"""Counter-based random draws: a generator depends only on a seed and a key.

So a cell does not depend on batch size, number of workers or devices, or the other requested targets.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from pertcast.stats.groups import compiled


def key_hash(seed: int, *key: str | int) -> int:
    """Return a 128-bit integer that depends on the seed and on every part of the key.

    >>> key_hash(0, "controls", "H1", "TET1") == key_hash(0, "controls", "H1", "TET1")
    True
    >>> key_hash(0, "a", "bc") == key_hash(0, "ab", "c")
    False
    """
    texts = [f"{type(part).__name__}:{part}".encode() for part in (seed, *key)]
    content = b"".join([len(text).to_bytes(8, "little") + text for text in texts])
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """Return a NumPy generator (Philox, counter-based) keyed by the seed and the key.

    >>> int(generator(7, "split", "H1").integers(1000)) == int(generator(7, "split", "H1").integers(1000))
    True
    """
    return np.random.Generator(np.random.Philox(key=key_hash(seed, *key)))


_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ONE, _11, _27, _30, _31 = (np.uint64(number) for number in (1, 11, 27, 30, 31))
_UNIT = 1.0 / (1 << 53)


def uniform_key(seed: int, *key: str | int) -> np.uint64:
    """Return the key of a stream of uniform numbers for :func:`uniform`.

    >>> int(uniform_key(0, "cells", "H1")) == int(uniform_key(0, "cells", "H1"))
    True
    """
    return np.uint64(key_hash(seed, *key) & 0xFFFFFFFFFFFFFFFF)


@compiled
def uniform(key: Any, counter: Any) -> float:
    """Return number `counter` of a stream, in (0, 1), in compiled functions."""
    state = key + (counter + _ONE) * _STEP
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    state = state ^ (state >> _31)
    return (float(state >> _11) + 0.5) * _UNIT
