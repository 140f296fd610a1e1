"""The terms of the loss for a batch, and what each weighs at a step.

Shapes: B sets, G predicted genes, K other perturbations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pertcast.config import LossConfig
from pertcast.models.losses import de_loss, energy_distance, pseudobulk_mae, ranking_loss
from pertcast.models.state import Prediction
from pertcast.train.batches import Batch
from pertcast.train.truth import Known

__all__ = ["loss_terms", "needs_truth", "total_loss"]

_AUXILIARY = ("mae", "de", "rank")


def needs_truth(config: LossConfig) -> bool:
    """Return whether a term is switched on that needs the effects or labels of the training split."""
    return bool(config.de or config.rank)


def loss_terms(
    prediction: Prediction,
    batch: Batch,
    config: LossConfig,
    *,
    known: Known | None = None,
    others_BKG: Tensor | None = None,
    others_exist_BK: Tensor | None = None,
    positive_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Return the terms of the loss that are switched on, each a mean over the sets, without weights.

    Parameters
    ----------
    prediction, batch
        What the network gives, and the cells that it should give.
    config
        Weights and options; a term with weight 0 is not computed.
    known, others_BKG, others_exist_BK
        What the training split says of the sets, effects of other perturbations, and which of these there are; needed
        for the terms "de" and "rank".
    positive_weight
        What a differentially expressed gene weighs.
    """
    terms = {}
    if config.energy:
        terms["energy"] = energy_distance(prediction.latent_BSO, batch.real_BSO).mean()
    if config.decoder and prediction.genes_BSG is not None and batch.genes_BSG is not None:
        terms["decoder"] = energy_distance(prediction.genes_BSG, batch.genes_BSG).mean()
    real_BSG = batch.real_BSO if batch.genes_BSG is None else batch.genes_BSG
    if config.mae:
        terms["mae"] = pseudobulk_mae(prediction.log1p_BSG, real_BSG).mean()
    if config.de and known is not None and known.labels_BG is not None and known.valid_BG is not None:
        if prediction.de_BG is None:
            raise ValueError("the term de needs a network with a DE head")
        focal = config.de_form == "focal"
        terms["de"] = de_loss(
            prediction.de_BG,
            known.labels_BG,
            known.valid_BG,
            positive_weight=1.0 if focal else positive_weight,
            gamma=config.de_gamma if focal else 0.0,
        ).mean()
    if config.rank and known is not None and others_BKG is not None and others_exist_BK is not None:
        terms["rank"] = _rank(prediction, batch, real_BSG, config, known, others_BKG, others_exist_BK)
    return terms


def _rank(
    prediction: Prediction,
    batch: Batch,
    real_BSG: Tensor,
    config: LossConfig,
    known: Known,
    others_BKG: Tensor,
    others_exist_BK: Tensor,
) -> Tensor:
    """Return the ranking loss; sets of control cells have no rank, as in the official metric."""
    set_effect_BG = real_BSG.float().mean(1) - known.control_mean_BG
    # The mean of all training cells is less noisy than that of a set; held-out perturbations have none.
    real_BG = torch.where(known.has_effect_B[:, None], known.effect_BG, set_effect_BG)
    is_perturbed_B = ~known.is_control_B
    comparable_BB = (
        (batch.context_B[:, None] == batch.context_B)
        & (batch.pert_B[:, None] != batch.pert_B)
        & is_perturbed_B[:, None]
        & is_perturbed_B
    )
    size = len(real_BG)
    return ranking_loss(
        prediction.log1p_BSG.float().mean(1) - known.control_mean_BG,
        real_BG,
        torch.cat([real_BG.expand(size, -1, -1), others_BKG], dim=1),
        valid_BK=torch.cat([comparable_BB, others_exist_BK & is_perturbed_B[:, None]], dim=1),
        own_gene_B=known.own_gene_B,
        distance=config.rank_distance,
        margin=config.rank_margin,
    ).mean()


def total_loss(terms: Mapping[str, Tensor], config: LossConfig, *, step: int | None) -> Tensor:
    """Return the weighted sum of the terms.

    Parameters
    ----------
    terms
        From :func:`loss_terms`.
    config
        Weights.
    step
        Steps done, while auxiliary weights still rise; ``None`` for their full height, as in validation.
    """
    share = 1.0 if step is None or not config.warmup_steps else min(1.0, (step + 1) / config.warmup_steps)
    weights = {name: getattr(config, name) * (share if name in _AUXILIARY else 1.0) for name in terms}
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()
