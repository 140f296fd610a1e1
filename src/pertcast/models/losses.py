"""What training minimises, as pure functions of predicted and real cells.

Shapes: B sets of a step, S cells in a set, T cells in the other set, G genes (or latent dimensions).
Every loss is computed in float32 (float64 stays float64), whatever the autocast around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["energy_distance"]

# geomloss floors squared distances here; the same floor makes small sets agree with it and stops the gradient at 0.
_SQUARED_FLOOR = 1e-8


def energy_distance(pred_BSG: Tensor, real_BSG: Tensor) -> Tensor:
    """Return the energy distance between the predicted and the real cells of each set.

    ``mean |x - y| - 1/2 mean |x - x'| - 1/2 mean |y - y'|`` over all pairs, the pairs of a cell with itself included:
    the value of geomloss ``SamplesLoss("energy")``, so that loss weights mean what they mean in STATE.
    A distance below 1e-4 counts as 1e-4 and has gradient 0, as there.

    Parameters
    ----------
    pred_BSG
        Predicted cells, ``(B, S, G)``, on any one scale.
    real_BSG
        Real cells on the same scale, ``(B, T, G)``; T may differ from S.

    Returns
    -------
    Tensor
        ``(B,)``, float32 or float64.

    References
    ----------
    Székely and Rizzo, "Energy statistics: a class of statistics based on distances", 2013.

    Examples
    --------
    >>> pred, real = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    >>> round(energy_distance(pred, real).item(), 3)
    1.0
    """
    with torch.autocast(device_type=pred_BSG.device.type, enabled=False):
        dtype = torch.float64 if pred_BSG.dtype == torch.float64 else torch.float32
        # Distances do not see a shift; near the origin the matmul form loses the fewest digits.
        centre_B1G = real_BSG.detach().to(dtype).mean(1, keepdim=True)
        x_BSG, y_BTG = pred_BSG.to(dtype) - centre_B1G, real_BSG.to(dtype) - centre_B1G
        between_B = _distances(x_BSG, y_BTG).mean((1, 2))
        within_B = _distances(x_BSG).mean((1, 2)) + _distances(y_BTG).mean((1, 2))
        return between_B - within_B / 2


def _distances(x_BSG: Tensor, y_BTG: Tensor | None = None) -> Tensor:
    """Return Euclidean distances of all pairs, ``(B, S, T)``; of a set with itself when there is no other."""
    other_BTG = x_BSG if y_BTG is None else y_BTG
    squares_BS1 = x_BSG.square().sum(-1, keepdim=True)
    squares_B1T = other_BTG.square().sum(-1, keepdim=True).mT
    squared_BST = torch.baddbmm(squares_BS1 + squares_B1T, x_BSG, other_BTG.mT, alpha=-2)
    if y_BTG is None:
        # A cell's distance to itself is known; left to rounding it would be the largest error of the sum.
        squared_BST = squared_BST.masked_fill(torch.eye(x_BSG.shape[1], dtype=torch.bool, device=x_BSG.device), 0)
    return squared_BST.clamp_min(_SQUARED_FLOOR).sqrt()
