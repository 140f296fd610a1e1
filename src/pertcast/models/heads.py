"""MLPs, decoders, dropout, the confidence token, the DE head and the counts head.

Shapes: B sets, S cells in a set, H hidden, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pertcast.stats.draws import key_hash

_GOLDEN = 0x9E3779B9
_WORD = (1 << 64) - 1
# Multipliers of a well-mixing 32-bit hash, as signed numbers.
# Source: Christopher Wellons, "Prospecting for hash functions", 2018 (lowbias32).
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


class SetDropout(nn.Module):
    """Dropout with one key for each set; without keys it is ``nn.Dropout``."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.keys_B2: Tensor | None = None
        self.salt = 0

    def forward(self, values: Tensor) -> Tensor:
        """Return values of the same shape."""
        if not self.training or not self.share:
            return values
        if self.keys_B2 is None:
            return functional.dropout(values, self.share, training=True)
        keys_B2 = self.keys_B2 ^ self.salt
        places = torch.arange(values[0].numel(), dtype=torch.int32, device=values.device)
        hashed = places + keys_B2[:, :1]
        # A shift fills in with the sign; what it filled in is masked out.
        hashed = hashed.bitwise_xor_((hashed >> 16) & 0xFFFF).mul_(_FIRST).bitwise_xor_(keys_B2[:, 1:])
        hashed = hashed.bitwise_xor_((hashed >> 15) & 0x1FFFF).mul_(_SECOND)
        return values * (hashed >= round(self.share * 2**32) - 2**31).view(values.shape) * (1 / (1 - self.share))

    def extra_repr(self) -> str:
        """Return the share, for ``print(network)``."""
        return f"{self.share}"


def dropout_keys(seed: int, keys: Sequence[tuple[str | int, ...]]) -> Tensor:
    """Return the keys of some sets as int32 ``(B, 2)``."""
    words = [key_hash(seed, "dropout", *key) & _WORD for key in keys]
    return torch.from_numpy(np.array(words, dtype="<u8").view("<i4").reshape(-1, 2))


def dropouts_of(network: nn.Module) -> list[SetDropout]:
    """Return every dropout of a network, each with a salt of its own for the keys of the sets."""
    layers = [module for module in network.modules() if isinstance(module, SetDropout)]
    for number, layer in enumerate(layers):
        layer.salt = _signed(number * _GOLDEN)
    return layers


def key_dropout(layers: Sequence[SetDropout], keys_B2: Tensor | None) -> None:
    """Give dropouts the keys of the next sets; ``None`` removes them."""
    for layer in layers:
        layer.keys_B2 = keys_B2


def _signed(word: int) -> int:
    """Return the low 32 bits of a number as a signed one."""
    word &= (1 << 32) - 1
    return word - (1 << 32) if word >> 31 else word


# Tensors of a run that bear it serve training alone; whoever only predicts passes over them.
DE_HEAD_PREFIX = "de_head."
# Weights of the counts head, which only ``generate.cells = "nb_head"`` needs.
COUNTS_HEAD_PREFIX = "counts_head."
LOG_SHAPES = (-5.0, 5.0)
"""Between these a dispersion is learnt: from more than any gene shows to nearly a Poisson distribution."""
_FIRST_GAIN = 10.0


def mlp(width_in: int, hidden: int, width_out: int, *, layers: int, dropout: float) -> nn.Sequential:
    """Return `layers` linear layers with GELU and dropout between them."""
    widths = [width_in, *[hidden] * (layers - 1), width_out]
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.GELU(), SetDropout(dropout)]
    return nn.Sequential(*modules[:-2])


def normed_mlp(widths: Sequence[int], *, dropout: float) -> nn.Sequential:
    """Return linear layers of these widths, with LayerNorm, GELU and dropout between them."""
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU(), SetDropout(dropout)]
    return nn.Sequential(*modules[:-3])


def bottleneck(width: int) -> nn.Sequential:
    """Return two linear layers with a GELU between them, through an eighth of the width."""
    return nn.Sequential(nn.Linear(width, width // 8), nn.GELU(), nn.Linear(width // 8, width))


class ConfidenceToken(nn.Module):
    """A learnt token that attends to the cells of a set, and its estimate of their error."""

    def __init__(self, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.confidence_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.confidence_projection = normed_mlp((hidden, hidden // 2, hidden // 4, 1), dropout=dropout)

    def forward(self, token_B1H: Tensor) -> Tensor:
        """Return the confidence of each set, ``(B,)``, at least 0, from the token's own output."""
        return self.confidence_projection(token_B1H).relu().flatten()


class DeHead(nn.Module):
    """Predict which genes are differentially expressed: a logit from the set's pooled state and predicted effect."""

    def __init__(self, hidden: int, num_genes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.state = nn.Linear(hidden, num_genes)
        self.gain_G = nn.Parameter(torch.empty(num_genes))

    @torch.no_grad()
    def start(self) -> None:
        """Set the initial weights: every logit is the gain of 10 times the size of the effect."""
        self.norm.weight.fill_(1)
        self.norm.bias.zero_()
        self.state.weight.zero_()
        self.state.bias.zero_()
        self.gain_G.fill_(_FIRST_GAIN)

    def forward(self, pooled_BH: Tensor, effect_BG: Tensor) -> Tensor:
        """Return the logits, ``(B, G)``."""
        return self.state(self.norm(pooled_BH)) + self.gain_G * effect_BG.abs()


class CountsPrediction(NamedTuple):
    """The output of the counts head."""

    log_fold_BG: Tensor  # Logarithm of each gene's rate over that of control cells of the context
    log_shape_G: Tensor  # Logarithm of 1 / dispersion


class CountsHead(nn.Module):
    """Predict the negative binomial counts of perturbed cells, relative to control cells."""

    def __init__(self, hidden: int, num_genes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.state = nn.Linear(hidden, num_genes)
        self.log_shape_G = nn.Parameter(torch.empty(num_genes))

    @torch.no_grad()
    def start(self, log_shape_G: Tensor) -> None:
        """Set the initial weights: no change of any rate, and these dispersions."""
        self.norm.weight.fill_(1)
        self.norm.bias.zero_()
        self.state.weight.zero_()
        self.state.bias.zero_()
        self.log_shape_G.copy_(log_shape_G.clamp(*LOG_SHAPES))

    def forward(self, pooled_BH: Tensor) -> CountsPrediction:
        """Return the log fold changes of the rates, and the dispersions."""
        return CountsPrediction(self.state(self.norm(pooled_BH)), self.log_shape_G.clamp(*LOG_SHAPES))
