"""Dropout that is keyed by set: what a set loses depends on its key alone, not on the batch or the device it is on.

Shapes: B sets; behind them any others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pertcast.stats.draws import key_hash

__all__ = ["SetDropout", "dropout_keys", "key_dropout"]

_GOLDEN = 0x9E3779B9
# Multipliers of a well-mixing 32-bit hash, as signed numbers.
# Source: Christopher Wellons, "Prospecting for hash functions", 2018 (lowbias32).
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


class SetDropout(nn.Module):
    """Dropout over a batch whose first dimension is sets; without keys, as ``nn.Dropout``.

    Whether a value is dropped is a hash of the set's key, the layer's number and the value's place in the set, so any
    split of a batch over devices drops the same values. It is also less work than to draw.

    Parameters
    ----------
    share
        How much is dropped in training; what is left is scaled up.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.keys_B2: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Return values of the same shape."""
        if not self.training or not self.share:
            return values
        if self.keys_B2 is None:
            return functional.dropout(values, self.share, training=True)
        return values * self._kept(values, self.keys_B2) * (1 / (1 - self.share))

    def _kept(self, values: Tensor, keys_B2: Tensor) -> Tensor:
        places = torch.arange(values[0].numel(), dtype=torch.int32, device=values.device)
        hashed = places + keys_B2[:, :1]
        # A shift fills in with the sign; what it filled in is masked out.
        hashed = hashed.bitwise_xor_((hashed >> 16) & 0xFFFF).mul_(_FIRST).bitwise_xor_(keys_B2[:, 1:])
        hashed = hashed.bitwise_xor_((hashed >> 15) & 0x1FFFF).mul_(_SECOND)
        return (hashed >= round(self.share * 2**32) - 2**31).view(values.shape)

    def extra_repr(self) -> str:
        """Return the share, as ``print(network)`` shows it."""
        return f"{self.share}"


def dropout_keys(seed: int, keys: Sequence[tuple[str | int, ...]]) -> Tensor:
    """Return the keys of some sets as int32 ``(B, 2)``."""
    words = [key_hash(seed, "dropout", *key) for key in keys]
    return torch.tensor([[_signed(word), _signed(word >> 32)] for word in words], dtype=torch.int32)


def key_dropout(network: nn.Module, keys_B2: Tensor | None) -> None:
    """Give every dropout of a network the keys of the sets that come next; ``None`` takes them away."""
    layers = [module for module in network.modules() if isinstance(module, SetDropout)]
    for number, layer in enumerate(layers):
        layer.keys_B2 = None if keys_B2 is None else keys_B2 ^ _signed(number * _GOLDEN)


def _signed(word: int) -> int:
    """Return the low 32 bits of a number as a signed one."""
    word &= (1 << 32) - 1
    return word - (1 << 32) if word >> 31 else word
