"""What training minimises, as pure functions of predicted and real cells.

Shapes: B sets of a step, S cells in a set, T cells in the other set, G genes (or latent dimensions), K other
perturbations. Every loss is computed in float32 (float64 stays float64), whatever the autocast around it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pertcast.models.linear import times_transposed

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
        distance_B: Tensor = _EnergyDistance.apply(  # type: ignore[no-untyped-call]
            pred_BSG.to(dtype), real_BSG.detach().to(dtype)
        )
        return distance_B


class _EnergyDistance(torch.autograd.Function):
    """The gradient is found beside the value, while the cells of a set are still in the cache; it alone is kept."""

    @staticmethod
    def forward(ctx: Any, pred_BSG: Tensor, real_BTG: Tensor) -> Tensor:
        contiguous = torch.contiguous_format
        gradient_BSG = torch.empty_like(pred_BSG, memory_format=contiguous) if ctx.needs_input_grad[0] else None
        if pred_BSG.device.type == "cpu":
            gradients = [None] * len(pred_BSG) if gradient_BSG is None else list(gradient_BSG)
            distance_B = torch.stack([_energy(*one) for one in zip(pred_BSG, real_BTG, gradients, strict=True)])
        else:
            distance_B = _energy(pred_BSG, real_BTG, gradient_BSG)
        if gradient_BSG is not None:
            ctx.save_for_backward(gradient_BSG)
        return distance_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (gradient_BSG,) = ctx.saved_tensors
        return gradient_BSG * outer[0][:, None, None], None


def _energy(x_SG: Tensor, y_TG: Tensor, gradient_SG: Tensor | None) -> Tensor:
    """Return the energy distance of one set (or of all, with a leading dimension), and write its gradient in x.

    Squared distances come from products of cells about their own means, where these lose the fewest digits; between
    the two the difference of the means comes back in.
    """
    num_x, num_y = x_SG.shape[-2], y_TG.shape[-2]
    x_mean_1G, y_mean_1G = x_SG.mean(-2, keepdim=True), y_TG.mean(-2, keepdim=True)
    # both sets and the difference of their means, one below the other: two products give all, one the gradient
    all_AG = x_SG.new_empty((*x_SG.shape[:-2], num_x + num_y + 1, x_SG.shape[-1]))
    own_SG, other_TG = all_AG[..., :num_x, :], all_AG[..., num_x:-1, :]
    torch.sub(x_SG, x_mean_1G, out=own_SG)
    torch.sub(y_TG, y_mean_1G, out=other_TG)
    torch.sub(x_mean_1G, y_mean_1G, out=all_AG[..., -1:, :])
    x_products_SA = times_transposed(own_SG, all_AG)
    y_products_TT = times_transposed(other_TG, all_AG[..., num_x:, :])
    x_squares_S1 = x_products_SA.diagonal(dim1=-2, dim2=-1)[..., None]
    y_squares_T1 = y_products_TT.diagonal(dim1=-2, dim2=-1)[..., None]
    shift_S1, shift_T1 = x_products_SA[..., -1:], y_products_TT[..., -1:]
    shift_11 = all_AG[..., -1:, :].square().sum(-1, keepdim=True)
    to_x_S1 = x_squares_S1 + 2 * shift_S1 + shift_11
    to_y_T1 = y_squares_T1 - 2 * shift_T1
    between_ST, between_inverse_ST = _roots(to_x_S1 + to_y_T1.mT - 2 * x_products_SA[..., num_x:-1])
    within_x_SS, within_x_inverse_SS = _roots(
        _without_diagonal(x_squares_S1 + x_squares_S1.mT - 2 * x_products_SA[..., :num_x])
    )
    within_y_TT, _ = _roots(_without_diagonal(y_squares_T1 + y_squares_T1.mT - 2 * y_products_TT[..., :-1]))
    if gradient_SG is not None:
        # d/dx of |x - y| is (x - y) / |x - y|: a row of sums of cells, each over its distance
        to_y_ST = between_inverse_ST / (num_x * num_y)
        to_x_SS = within_x_inverse_SS / num_x**2
        to_all_S1 = to_y_ST.sum(-1, keepdim=True)
        to_x_SS.diagonal(dim1=-2, dim2=-1).add_((to_all_S1 - to_x_SS.sum(-1, keepdim=True))[..., 0])
        weights_SA = torch.cat([to_x_SS, -to_y_ST, to_all_S1], dim=-1)
        gradient_SG.copy_(times_transposed(weights_SA, all_AG.mT))
    return between_ST.mean((-2, -1)) - (within_x_SS.mean((-2, -1)) + within_y_TT.mean((-2, -1))) / 2


def _roots(squared_ST: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances of at least the floor, and one over them, 0 where the floor holds."""
    root_ST = squared_ST.clamp_min(_SQUARED_FLOOR).sqrt_()
    return root_ST, torch.where(squared_ST > _SQUARED_FLOOR, root_ST.reciprocal(), 0)


def _without_diagonal(squared_SS: Tensor) -> Tensor:
    """Return it with 0 where a cell's distance to itself stands: left to rounding it would be the largest error."""
    squared_SS.diagonal(dim1=-2, dim2=-1).zero_()
    return squared_SS


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
