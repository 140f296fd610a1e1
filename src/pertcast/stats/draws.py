"""Counter-based random draws: a generator is a pure function of a seed and a key, never of what was drawn before.

So a cell does not depend on batch size, worker count, device count, or which targets were asked for beside it.
"""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["generator", "key_hash"]


def key_hash(seed: int, *key: str | int) -> int:
    """Return a 128-bit integer that depends on the seed and on every part of the key.

    Parameters
    ----------
    seed
        The experiment's seed.
    key
        What the draw is for: a purpose, then a context, target, set number and so on. ``1`` and ``"1"`` differ.

    Examples
    --------
    >>> key_hash(0, "controls", "H1", "TET1") == key_hash(0, "controls", "H1", "TET1")
    True
    >>> key_hash(0, "a", "bc") == key_hash(0, "ab", "c")
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *key):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """Return a NumPy generator (Philox, counter-based) keyed by the seed and the key.

    Examples
    --------
    >>> int(generator(7, "split", "H1").integers(1000)) == int(generator(7, "split", "H1").integers(1000))
    True
    """
    return np.random.Generator(np.random.Philox(key=key_hash(seed, *key)))
