"""What training minimises, as pure functions of predicted and real cells.

Shapes: B sets of a step, S cells in a set, T cells in the other set, G genes (or latent dimensions), K other
perturbations. Every loss is computed in float32 (float64 stays float64), whatever the autocast around it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "call_logits",
    "de_loss",
    "energy_distance",
    "negative_binomial_loss",
    "order_loss",
    "pseudobulk_mae",
    "ranking_loss",
]

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


def negative_binomial_loss(
    counts_BSG: Tensor, log_mean_BSG: Tensor, log_shape_G: Tensor, *, measured_BG: Tensor | None = None
) -> Tensor:
    """Return the negative log-likelihood of counts, a mean over the cells and genes of each set.

    A count is negative binomial with variance ``mean + mean**2 / shape``. Logarithms of gamma functions are computed of
    the counts above 0 alone, which are the fewest.

    Parameters
    ----------
    counts_BSG
        Whole counts, ``(B, S, G)``.
    log_mean_BSG
        Logarithms of their means, ``(B, S, G)``.
    log_shape_G
        Logarithms of 1 / dispersion, ``(G,)``.
    measured_BG
        Which genes count, bool ``(B, G)``; the counts of the others must be 0. All where not given.

    Returns
    -------
    Tensor
        ``(B,)``, float32 or float64.

    References
    ----------
    Lopez et al., "Deep generative modeling for single-cell transcriptomics", 2018.

    Examples
    --------
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
