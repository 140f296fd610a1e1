"""How likely whole counts are: the negative log-likelihood of the counts head, a pure function.

Shapes: B sets of a step, S cells in a set, G genes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pertcast.models.losses import working_dtype

__all__ = ["negative_binomial_loss"]


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
