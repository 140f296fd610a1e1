"""What training minimises, as pure functions of predicted and real cells.

Shapes: B sets of a step, S cells in a set, T cells in the other set, G genes (or latent dimensions), K other
perturbations. Every loss is computed in float32 (float64 stays float64), whatever the autocast around it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["de_loss", "energy_distance", "pseudobulk_mae", "ranking_loss"]

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
        dtype = _working_dtype(pred_BSG)
        # Distances do not see a shift; near the origin the matmul form loses the fewest digits.
        centre_B1G = real_BSG.detach().to(dtype).mean(1, keepdim=True)
        x_BSG, y_BTG = pred_BSG.to(dtype) - centre_B1G, real_BSG.to(dtype) - centre_B1G
        between_B = _distances(x_BSG, y_BTG).mean((1, 2))
        # and predicted cells that are far from the real ones are near their own mean
        own_BSG = x_BSG - x_BSG.detach().mean(1, keepdim=True)
        within_B = _distances(own_BSG).mean((1, 2)) + _distances(y_BTG).mean((1, 2))
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
        dtype = _working_dtype(pred_BSG)
        return (pred_BSG.to(dtype).mean(1) - real_BSG.to(dtype).mean(1)).abs().mean(-1)


def de_loss(
    logits_BG: Tensor, labels_BG: Tensor, valid_BG: Tensor, *, positive_weight: float = 1.0, gamma: float = 0.0
) -> Tensor:
    """Return the cross-entropy of "is this gene differentially expressed?", a mean over the valid genes of each set.

    Parameters
    ----------
    logits_BG
        The head's output, ``(B, G)``.
    labels_BG
        Whether the gene is differentially expressed, bool ``(B, G)``.
    valid_BG
        Where there is a label, bool ``(B, G)``; a set without any gets 0.
    positive_weight
        What a differentially expressed gene weighs; the others weigh 1.
    gamma
        Above 0, the focal loss: a gene counts ``(1 - probability of its label) ** gamma``.

    Returns
    -------
    Tensor
        ``(B,)``, float32 or float64.

    References
    ----------
    Lin et al., "Focal loss for dense object detection", 2017.

    Examples
    --------
    >>> yes = torch.ones(1, 4, dtype=torch.bool)
    >>> round(de_loss(torch.zeros(1, 4), yes, yes).item(), 4)
    0.6931
    """
    with torch.autocast(device_type=logits_BG.device.type, enabled=False):
        logits_BG = logits_BG.to(_working_dtype(logits_BG))
        # How far the logit is on the side of its label.
        margin_BG = torch.where(labels_BG, logits_BG, -logits_BG)
        loss_BG = functional.softplus(-margin_BG)
        if gamma:
            # (1 - p) ** gamma through its logarithm, whose gradient stays finite where p is 1.
            loss_BG = loss_BG * torch.exp(gamma * functional.logsigmoid(-margin_BG))
        weight_BG = torch.where(labels_BG, positive_weight, 1.0).to(loss_BG.dtype) * valid_BG
        return (loss_BG * weight_BG).sum(-1) / valid_BG.sum(-1).clamp_min(1)


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
        dtype = _working_dtype(pred_BG)
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


def _working_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
