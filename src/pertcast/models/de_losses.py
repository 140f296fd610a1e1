"""What a DE head minimises, as pure functions of what is predicted of each gene and of which are differential.

Shapes: B sets of a step, G genes. Computed in float32 (float64 stays float64), whatever the autocast around it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pertcast.models.losses import working_dtype

__all__ = ["call_logits", "de_loss", "order_loss"]

# How steeply a call follows from the size of an effect; at effect 0 it has 5 %.
_SHARPNESS = 3.0


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
        logits_BG = logits_BG.to(working_dtype(logits_BG))
        # How far the logit is on the side of its label.
        margin_BG = torch.where(labels_BG, logits_BG, -logits_BG)
        loss_BG = functional.softplus(-margin_BG)
        if gamma:
            # (1 - p) ** gamma through its logarithm, whose gradient stays finite where p is 1.
            loss_BG = loss_BG * torch.exp(gamma * functional.logsigmoid(-margin_BG))
        weight_BG = torch.where(labels_BG, positive_weight, 1.0).to(loss_BG.dtype) * valid_BG
        return (loss_BG * weight_BG).sum(-1) / valid_BG.sum(-1).clamp_min(1)


def call_logits(effect_BG: Tensor, direction_BG: Tensor, threshold_BG: Tensor) -> Tensor:
    """Return logits of "the official test would call this gene", a soft version of the test on predicted effects.

    ``3 (x / threshold - 1)`` where x is the effect in the gene's real direction, or its size where the gene has none: a
    differentially expressed gene must be predicted large enough and on the right side, the others small enough.

    Parameters
    ----------
    effect_BG
        Predicted effects, ``(B, G)``, in log1p units.
    direction_BG
        1 or -1 for genes that are differentially expressed, up or down; 0 for the others.
    threshold_BG
        The size from which on the test calls a gene, above 0.

    Returns
    -------
    Tensor
        ``(B, G)``, float32 or float64.

    Examples
    --------
    >>> call_logits(torch.tensor([[0.5, -0.5]]), torch.tensor([[1, 1]]), torch.tensor([[0.5, 0.5]]))
    tensor([[ 0., -6.]])
    """
    with torch.autocast(device_type=effect_BG.device.type, enabled=False):
        effect_BG = effect_BG.to(working_dtype(effect_BG))
        sided_BG = _in_real_direction(effect_BG, direction_BG)
        return _SHARPNESS * (sided_BG / threshold_BG - 1)


def order_loss(effect_BG: Tensor, direction_BG: Tensor, scale_B: Tensor) -> Tensor:
    """Return how badly the sizes of a predicted effect tell differentially expressed genes from others.

    ``log(1 + sum over others h of exp((x_h - x_g) / scale))``, a mean over the differentially expressed genes g, where
    x is the effect in the gene's real direction, or its size where the gene has none. Every perturbation weighs the
    same however many genes it changes, as in the official score, a mean over perturbations of the share of their genes
    that is found; and how many there are, which features hardly tell, is not asked for.

    Parameters
    ----------
    effect_BG
        Predicted effects, ``(B, G)``, in log1p units.
    direction_BG
        1 or -1 for genes that are differentially expressed, up or down; 0 for the others.
    scale_B
        What a set's effects are measured in, above 0.

    Returns
    -------
    Tensor
        ``(B,)``, float32 or float64; 0 for a set without differentially expressed genes.

    References
    ----------
    Sohn, "Improved deep metric learning with multi-class N-pair loss objective", 2016.

    Examples
    --------
    >>> effect, direction = torch.tensor([[2.0, -2.0, 0.0, 0.0]]), torch.tensor([[1, -1, 0, 0]])
    >>> [round(order_loss(share * effect, direction, torch.ones(1)).item(), 3) for share in (-1, 0, 1, 2)]
    [2.759, 1.099, 0.24, 0.036]
    """
    with torch.autocast(device_type=effect_BG.device.type, enabled=False):
        size_BG = _in_real_direction(effect_BG.to(working_dtype(effect_BG)), direction_BG) / scale_B[:, None]
        is_de_BG = direction_BG != 0
        others_B1 = size_BG.masked_fill(is_de_BG, -torch.inf).logsumexp(-1, keepdim=True)
        return (functional.softplus(others_B1 - size_BG) * is_de_BG).sum(-1) / is_de_BG.sum(-1).clamp_min(1)


def _in_real_direction(effect_BG: Tensor, direction_BG: Tensor) -> Tensor:
    """Return effects in the genes' real direction, and their size where a gene has none."""
    return torch.where(direction_BG == 0, effect_BG.abs(), effect_BG * direction_BG)
