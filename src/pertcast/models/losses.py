"""All losses, as pure functions of predicted and real cells.

Shapes: B sets of a step, S cells in a set, T cells in the other set, G genes (or latent dimensions), K other
perturbations. Every loss is computed in float32 (float64 stays float64), whatever the autocast around it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

# geomloss floors squared distances here; the same floor makes small sets agree with it and stops the gradient at 0.
_SQUARED_FLOOR = 1e-8
# Distances up to this one are at the floor: its root is rounded.
_FLOOR = 1.0001e-4
# The direction of an effect as short as this is noise; the floor also keeps the gradient finite at effect 0.
_NORM_FLOOR = 0.1


def energy_distance(pred_BSG: Tensor, real_BTG: Tensor) -> Tensor:
    """Return the energy distance between the predicted and the real cells of each set.

    >>> pred, real = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    >>> round(energy_distance(pred, real).item(), 3)
    1.0
    """
    with torch.autocast(device_type=pred_BSG.device.type, enabled=False):
        dtype = working_dtype(pred_BSG)
        cells = pred_BSG.to(dtype), real_BTG.detach().to(dtype)
        distance_B: Tensor = _EnergyDistance.apply(*cells)  # type: ignore[no-untyped-call]
        return distance_B


class _EnergyDistance(torch.autograd.Function):
    """The energy distance with its gradient in closed form: one product more, and no pass over single genes.

    The gradient of a distance is the difference of its two cells divided by it. So the gradient of all is a matrix of
    weights (S, S + T), whose rows sum to 0, times the cells.
    """

    @staticmethod
    def forward(ctx: Any, pred_BSG: Tensor, real_BTG: Tensor) -> Tensor:
        num_pred, num_real = pred_BSG.shape[1], real_BTG.shape[1]
        # Products of cells far from 0 lose digits, and predicted cells are near one another: take off their mean.
        cells_BCG = _joined(pred_BSG, real_BTG, pred_BSG.mean(1, keepdim=True))
        real_BTG = cells_BCG[:, num_pred:]
        products_BSC = cells_BCG[:, :num_pred] @ cells_BCG.mT
        real_products_BTT = real_BTG @ real_BTG.mT
        pred_squares_BS = products_BSC[:, :, :num_pred].diagonal(dim1=1, dim2=2)
        real_squares_BT = real_products_BTT.diagonal(dim1=1, dim2=2)
        squares_BC = torch.cat([pred_squares_BS, real_squares_BT], dim=1)
        distances_BSC = _distances(pred_squares_BS, squares_BC, products_BSC)
        within_real_B = _distances(real_squares_BT, real_squares_BT, real_products_BTT).mean((1, 2))
        weights_C = distances_BSC.new_full((num_pred + num_real,), 1 / (num_pred * num_real))
        weights_C[:num_pred] = -0.5 / num_pred**2
        if ctx.needs_input_grad[0]:
            # a predicted cell moves on both sides of the distances among predicted cells
            weights_C[:num_pred] *= 2
            slopes_BSC = (weights_C / distances_BSC).masked_fill_(distances_BSC <= _FLOOR, 0).neg_()
            slopes_BSC.diagonal(dim1=1, dim2=2).sub_(slopes_BSC.sum(-1))
            ctx.save_for_backward(slopes_BSC, cells_BCG)
            weights_C[:num_pred] /= 2
        return (distances_BSC @ weights_C).sum(1) - within_real_B / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        slopes_BSC, cells_BCG = ctx.saved_tensors
        return (gradients[0][:, None, None] * slopes_BSC) @ cells_BCG, None


def _joined(pred_BSG: Tensor, real_BTG: Tensor, mean_B1G: Tensor) -> Tensor:
    """Return both kinds of cells about a mean, (B, S + T, G), in one pass."""
    if torch.compiler.is_compiling():
        return torch.cat([pred_BSG - mean_B1G, real_BTG - mean_B1G], dim=1)
    num_pred = pred_BSG.shape[1]
    cells_BCG = pred_BSG.new_empty(len(pred_BSG), num_pred + real_BTG.shape[1], pred_BSG.shape[2])
    torch.sub(pred_BSG, mean_B1G, out=cells_BCG[:, :num_pred])
    torch.sub(real_BTG, mean_B1G, out=cells_BCG[:, num_pred:])
    return cells_BCG


def _distances(squares_BS: Tensor, other_squares_BC: Tensor, products_BSC: Tensor) -> Tensor:
    """Return distances of at least 1e-4 from squared lengths and products."""
    squared_BSC = torch.sub(squares_BS[:, :, None] + other_squares_BC[:, None], products_BSC, alpha=2)
    return squared_BSC.clamp_min_(_SQUARED_FLOOR).sqrt_()


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
