"""What training minimises, as pure functions of predicted and real cells.

Shapes: B sets of a step, S cells in a set, T cells in the other set, G genes (or latent dimensions), K other
perturbations. Every loss is computed in float32 (float64 stays float64), whatever the autocast around it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["energy_distance", "pseudobulk_mae", "ranking_loss", "working_dtype"]

# geomloss floors squared distances here; the same floor makes small sets agree with it and stops the gradient at 0.
_SQUARED_FLOOR = 1e-8
# The direction of an effect as short as this is noise; the floor also keeps the gradient finite at effect 0.
_NORM_FLOOR = 0.1


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
        Real cells on the same scale, ``(B, T, G)``; T may differ from S. They are constants: no gradient reaches them.

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
        dtype = working_dtype(pred_BSG)
        # distances do not depend on the origin, but their rounding does: near the cells it is smallest
        origin_B1G = real_BSG.detach().to(dtype).mean(-2, keepdim=True)
        pred_BSG, real_BSG = pred_BSG.to(dtype) - origin_B1G, real_BSG.detach().to(dtype) - origin_B1G
        between_BST = _distances(pred_BSG, real_BSG)
        within_pred_BSS, within_real_BTT = _distances(pred_BSG, pred_BSG), _distances(real_BSG, real_BSG)
        return between_BST.mean((1, 2)) - (within_pred_BSS.mean((1, 2)) + within_real_BTT.mean((1, 2))) / 2


def _distances(x_BSG: Tensor, y_BTG: Tensor) -> Tensor:
    """Return the distances of all pairs of cells, ``(B, S, T)``, at least 1e-4; a cell's to itself is exactly that."""
    squared_BST = x_BSG.square().sum(-1, keepdim=True) + y_BTG.square().sum(-1)[:, None] - 2 * x_BSG @ y_BTG.mT
    if x_BSG is y_BTG:
        squared_BST = squared_BST - torch.diag_embed(squared_BST.diagonal(dim1=-2, dim2=-1))
    return squared_BST.clamp_min(_SQUARED_FLOOR).sqrt()


def pseudobulk_mae(pred_BSG: Tensor, real_BSG: Tensor) -> Tensor:
    """Return the mean over genes of ``|mean of predicted cells - mean of real cells|`` of each set.

    Parameters
    ----------
    pred_BSG, real_BSG
        Log1p expression, ``(B, S, G)`` and ``(B, T, G)``.

    Returns
    -------
    Tensor
        ``(B,)``, float32 or float64; the gradient is 0 in genes whose means agree.

    Examples
    --------
    >>> pseudobulk_mae(torch.zeros(1, 2, 3), torch.ones(1, 4, 3))
    tensor([1.])
    """
    with torch.autocast(device_type=pred_BSG.device.type, enabled=False):
        dtype = working_dtype(pred_BSG)
        return (pred_BSG.to(dtype).mean(1) - real_BSG.to(dtype).mean(1)).abs().mean(-1)


def ranking_loss(
    pred_BG: Tensor,
    real_BG: Tensor,
    others_BKG: Tensor,
    *,
    valid_BK: Tensor,
    own_gene_B: Tensor,
    distance: Literal["l1", "cosine"] = "l1",
    margin: float,
) -> Tensor:
    """Return how much nearer each predicted effect should be to its own real effect than to those of others.

    ``max(0, d(pred, real) - d(pred, other) + margin)``, a mean over the valid others of each set.

    Parameters
    ----------
    pred_BG, real_BG
        Predicted and real effects, ``(B, G)``.
    others_BKG
        Real effects of other perturbations of the same context, ``(B, K, G)``.
    valid_BK
        Which of them count, bool ``(B, K)``; a set without any gets 0.
    own_gene_B
        The position of each perturbation's own gene, left out of both distances; -1 where it has none.
    distance
        ``l1``: mean over genes of absolute differences. ``cosine``: 1 - cosine; a norm below 0.1 counts as 0.1.
    margin
        By how much.

    Returns
    -------
    Tensor
        ``(B,)``, float32 or float64.

    Examples
    --------
    >>> pred, other = torch.zeros(1, 2), torch.ones(1, 1, 2)
    >>> options = {"valid_BK": torch.ones(1, 1, dtype=torch.bool), "own_gene_B": torch.tensor([-1])}
    >>> ranking_loss(pred, pred, other, margin=1.5, **options)
    tensor([0.5000])
    """
    with torch.autocast(device_type=pred_BG.device.type, enabled=False):
        dtype = working_dtype(pred_BG)
        kept_BG = torch.arange(pred_BG.shape[-1], device=pred_BG.device) != own_gene_B[:, None]
        pred_BG, real_BG = pred_BG.to(dtype) * kept_BG, real_BG.to(dtype) * kept_BG
        measure = _l1 if distance == "l1" else _one_minus_cosine
        # Genes that are left out are 0 on both sides and add nothing.
        own_B = measure(pred_BG, real_BG, kept_BG)
        other_BK = measure(pred_BG[:, None], others_BKG.to(dtype) * kept_BG[:, None], kept_BG[:, None])
        hinge_BK = (own_B[:, None] - other_BK + margin).clamp_min(0) * valid_BK
        return hinge_BK.sum(-1) / valid_BK.sum(-1).clamp_min(1)


def _l1(a: Tensor, b: Tensor, kept: Tensor) -> Tensor:
    return (a - b).abs().sum(-1) / kept.sum(-1).clamp_min(1)


def _one_minus_cosine(a: Tensor, b: Tensor, _kept: Tensor) -> Tensor:
    return 1 - (a * b).sum(-1) / (_norm(a) * _norm(b))


def _norm(a: Tensor) -> Tensor:
    return a.square().sum(-1).clamp_min(_NORM_FLOOR**2).sqrt()


def working_dtype(values: Tensor) -> torch.dtype:
    """Return what a loss of such values is computed in: float64 stays, all else is float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32
