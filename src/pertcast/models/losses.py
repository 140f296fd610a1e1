"""All losses, as pure functions of predicted and real cells.

Shapes: B sets of a step, S cells in a set, T cells in the other set, G genes (or latent dimensions), K other
perturbations. Every loss is computed in float32 (float64 stays float64), whatever the autocast around it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

# geomloss floors squared distances here; the same floor makes small sets agree with it and stops the gradient at 0.
_SQUARED_FLOOR = 1e-8
# The direction of an effect as short as this is noise; the floor also keeps the gradient finite at effect 0.
_NORM_FLOOR = 0.1


def energy_distance(pred_BSG: Tensor, real_BSG: Tensor) -> Tensor:
    """Return the energy distance between the predicted and the real cells of each set.

    >>> pred, real = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    >>> round(energy_distance(pred, real).item(), 3)
    1.0
    """
    with torch.autocast(device_type=pred_BSG.device.type, enabled=False):
        dtype = working_dtype(pred_BSG)
        pred_BSG, real_BTG = pred_BSG.to(dtype), real_BSG.detach().to(dtype)
        # Products of cells about their own means lose the fewest digits; the difference of the means comes back below.
        pred_mean_B1G, real_mean_B1G = pred_BSG.mean(1, keepdim=True), real_BTG.mean(1, keepdim=True)
        shift_B1G = pred_mean_B1G - real_mean_B1G
        pred_BSG, real_BTG = pred_BSG - pred_mean_B1G, real_BTG - real_mean_B1G
        pred_products_BSS, real_products_BTT = pred_BSG @ pred_BSG.detach().mT, real_BTG @ real_BTG.mT
        pred_squares_BS = _twice_the_gradient(pred_products_BSS.diagonal(dim1=1, dim2=2))
        real_squares_BT = real_products_BTT.diagonal(dim1=1, dim2=2)
        to_pred_BS = pred_squares_BS + 2 * (pred_BSG @ shift_B1G.mT)[..., 0] + shift_B1G.square().sum(-1)
        to_real_BT = real_squares_BT - 2 * (real_BTG @ shift_B1G.mT)[..., 0]
        within_pred_BSS = _distances(pred_squares_BS, pred_squares_BS.detach(), pred_products_BSS)
        within_real_BTT = _distances(real_squares_BT, real_squares_BT, real_products_BTT)
        between_BST = _distances(to_pred_BS, to_real_BT, pred_BSG @ real_BTG.mT)
        within_B = _twice_the_gradient(within_pred_BSS.mean((1, 2))) + within_real_BTT.mean((1, 2))
        return between_BST.mean((1, 2)) - within_B / 2


def _twice_the_gradient(value: Tensor) -> Tensor:
    """Return a value of predicted cells among themselves: both sides have one gradient, computed for one side."""
    return 2 * value - value.detach()


def _distances(squares_BS: Tensor, other_squares_BT: Tensor, products_BST: Tensor) -> Tensor:
    """Return distances of at least 1e-4 from squared lengths and products; at the floor the gradient is 0."""
    squared_BST = torch.sub(squares_BS[:, :, None] + other_squares_BT[:, None], products_BST, alpha=2)
    return squared_BST.clamp_min(_SQUARED_FLOOR).sqrt()


def pseudobulk_mae(pred_BSG: Tensor, real_BSG: Tensor) -> Tensor:
    """Return the mean over genes of ``|mean of predicted cells - mean of real cells|`` of each set.

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
    """Return how much nearer each predicted effect should be to its own real effect than to the others.

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
    """Return the dtype of a loss: float64 stays, everything else is float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def negative_binomial_loss(
    counts_BSG: Tensor, log_mean_BSG: Tensor, log_shape_G: Tensor, *, measured_BG: Tensor | None = None
) -> Tensor:
    """Return the negative log-likelihood of counts, a mean over the cells and genes of each set.

    >>> zero = torch.zeros(1, 1, 1)
    >>> round(negative_binomial_loss(zero, zero, torch.zeros(1)).item(), 4)
    0.6931
    """
    with torch.autocast(device_type=log_mean_BSG.device.type, enabled=False):
        dtype = working_dtype(log_mean_BSG)
        counts_BSG, log_shape_G = counts_BSG.to(dtype), log_shape_G.to(dtype)
        odds_BSG = log_mean_BSG.to(dtype) - log_shape_G
        # -log of shape / (shape + mean)
        cost_BSG = functional.softplus(odds_BSG)
        shape_G = log_shape_G.exp()
        set_N, cell_N, gene_N = counts_BSG.nonzero(as_tuple=True)
        count_N, shape_N = counts_BSG[set_N, cell_N, gene_N], shape_G[gene_N]
        seen_N = torch.lgamma(count_N + shape_N) - torch.lgamma(shape_N) - torch.lgamma(count_N + 1)
        seen_N = seen_N + count_N * (odds_BSG - cost_BSG)[set_N, cell_N, gene_N]
        num_values = counts_BSG.shape[1] * counts_BSG.shape[2]
        if measured_BG is None:
            return (cost_BSG.sum(1) @ shape_G).index_add(0, set_N, -seen_N) / num_values
        loss_B = ((cost_BSG.sum(1) * measured_BG) @ shape_G).index_add(0, set_N, -seen_N)
        return loss_B / (num_values * measured_BG.float().mean(1))


def de_loss(
    logits_BG: Tensor, labels_BG: Tensor, valid_BG: Tensor, *, positive_weight: float = 1.0, gamma: float = 0.0
) -> Tensor:
    """Return the cross-entropy of "is this gene differentially expressed?", a mean over the valid genes of each set.

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


def order_loss(effect_BG: Tensor, direction_BG: Tensor, scale_B: Tensor) -> Tensor:
    """Return how badly the predicted effect sizes separate differentially expressed genes from others.

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
    """Return effects in the genes' real direction, and absolute sizes for genes without one."""
    return torch.where(direction_BG == 0, effect_BG.abs(), effect_BG * direction_BG)
