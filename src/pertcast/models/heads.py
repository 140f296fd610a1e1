"""What stands around the transformer: MLPs, decoders, the last mixing of genes, the confidence token, two heads.

Shapes: B sets, S cells in a set, H hidden, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pertcast.models.dropout import SetDropout

__all__ = [
    "COUNTS_HEAD_PREFIX",
    "DE_HEAD_PREFIX",
    "LOG_SHAPES",
    "ConfidenceToken",
    "CountsHead",
    "CountsPrediction",
    "DeHead",
    "bottleneck",
    "mlp",
    "normed_mlp",
]

# Tensors of a run that bear it serve training alone; whoever only predicts passes over them.
DE_HEAD_PREFIX = "de_head."
# Of the head that cells of ``generate.cells = "nb_head"`` are drawn from; nobody else needs it.
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
    """Return linear layers through these widths, with LayerNorm, GELU and dropout between them."""
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU(), SetDropout(dropout)]
    return nn.Sequential(*modules[:-3])


def bottleneck(width: int) -> nn.Sequential:
    """Return two linear layers with a GELU between them, an eighth as wide there."""
    return nn.Sequential(nn.Linear(width, width // 8), nn.GELU(), nn.Linear(width // 8, width))


class ConfidenceToken(nn.Module):
    """A learnt token that attends to the cells of a set, and what it says of how well they are predicted.

    Parameters
    ----------
    hidden
        H.
    dropout
        Within the projection.
    """

    def __init__(self, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.confidence_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.confidence_projection = normed_mlp((hidden, hidden // 2, hidden // 4, 1), dropout=dropout)

    def forward(self, token_B1H: Tensor) -> Tensor:
        """Return the confidence of each set, ``(B,)``, at least 0; the token's own output goes in."""
        return self.confidence_projection(token_B1H).relu().flatten()


class DeHead(nn.Module):
    """Says for each gene whether the perturbation changes it: a logit from the set's pooled state and predicted effect.

    ``logit = linear(layer norm(pooled state)) + gain * |predicted effect|``, so that its gradient reaches the predicted
    cells themselves, in gene space. It serves training alone: predictions are the same with and without it.

    Parameters
    ----------
    hidden, num_genes
        H and G.
    """

    def __init__(self, hidden: int, num_genes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.state = nn.Linear(hidden, num_genes)
        self.gain_G = nn.Parameter(torch.empty(num_genes))

    @torch.no_grad()
    def start(self) -> None:
        """Set the first weights: every logit is the gain of 10 times the size of the effect."""
        self.norm.weight.fill_(1)
        self.norm.bias.zero_()
        self.state.weight.zero_()
        self.state.bias.zero_()
        self.gain_G.fill_(_FIRST_GAIN)

    def forward(self, pooled_BH: Tensor, effect_BG: Tensor) -> Tensor:
        """Return the logits, ``(B, G)``."""
        return self.state(self.norm(pooled_BH)) + self.gain_G * effect_BG.abs()


class CountsPrediction(NamedTuple):
    """What the counts head says.

    Attributes
    ----------
    log_fold_BG
        Logarithm of each gene's rate over that of control cells of the context.
    log_shape_G
        Logarithm of 1 / dispersion.
    """

    log_fold_BG: Tensor
    log_shape_G: Tensor


class CountsHead(nn.Module):
    """Says how counts of perturbed cells are distributed: negative binomial, beside what control cells show.

    The mean count of a cell is its library size times the control cells' share of the gene times ``exp(linear(layer
    norm(pooled state)))``; each gene has a dispersion. So before anything is learnt it gives the control cells' own
    distribution, in any context that has some. It stands beside the output and does not replace it: the other terms of
    the loss, and every other way to make cells, need single cells in log1p, and a run is the same with and without it.

    Parameters
    ----------
    hidden, num_genes
        H and G.
    """

    def __init__(self, hidden: int, num_genes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.state = nn.Linear(hidden, num_genes)
        self.log_shape_G = nn.Parameter(torch.empty(num_genes))

    @torch.no_grad()
    def start(self, log_shape_G: Tensor) -> None:
        """Set the first weights: no change of any rate, and these dispersions."""
        self.norm.weight.fill_(1)
        self.norm.bias.zero_()
        self.state.weight.zero_()
        self.state.bias.zero_()
        self.log_shape_G.copy_(log_shape_G.clamp(*LOG_SHAPES))

    def forward(self, pooled_BH: Tensor) -> CountsPrediction:
        """Return how rates change, and the dispersions."""
        return CountsPrediction(self.state(self.norm(pooled_BH)), self.log_shape_G.clamp(*LOG_SHAPES))
