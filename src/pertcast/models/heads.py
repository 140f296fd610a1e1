"""What stands around the transformer: MLPs, the gene decoder, the last mixing of genes, the confidence token.

Shapes: B sets, S cells in a set, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["ConfidenceToken", "bottleneck", "mlp", "normed_mlp"]


def mlp(width_in: int, hidden: int, width_out: int, *, layers: int, dropout: float) -> nn.Sequential:
    """Return `layers` linear layers with GELU and dropout between them."""
    widths = [width_in, *[hidden] * (layers - 1), width_out]
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*modules[:-2])


def normed_mlp(widths: Sequence[int], *, dropout: float) -> nn.Sequential:
    """Return linear layers through these widths, with LayerNorm, GELU and dropout between them."""
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU(), nn.Dropout(dropout)]
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
        confidence_B: Tensor = self.confidence_projection(token_B1H).relu().flatten()
        return confidence_B
