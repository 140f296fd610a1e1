"""The loss terms of a batch, and their weights at a step.

Shapes: B sets of this device, G predicted genes, K other perturbations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pertcast.config import LossConfig
from pertcast.models.heads import CountsPrediction
from pertcast.models.losses import (
    de_loss,
    energy_distance,
    negative_binomial_loss,
    order_loss,
    pseudobulk_mae,
    ranking_loss,
)
from pertcast.models.state import Prediction
from pertcast.train.batches import Batch
from pertcast.train.loss_targets import BatchTargets

_SMALLEST_DEPTH = 1e-9
# The unit of effects in the order loss, in mean thresholds of the test.
_SCALE = 2.0
_AUXILIARY = ("mae", "de", "rank", "nb")


class Others(NamedTuple):
    """Effects of other training perturbations to rank against, and which of them exist."""

    effects_BKG: Tensor
    exist_BK: Tensor


def needs_training_targets(config: LossConfig) -> bool:
    """Return whether a term is on that compares with effects or labels of the training split."""
    return bool(config.de or config.rank or config.nb or config.mae)


def loss_terms(
    prediction: Prediction,
    batch: Batch,
    config: LossConfig,
    *,
    targets: BatchTargets | None = None,
    others: Others | None = None,
    positive_weight: float = 1.0,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, Tensor]:
    """Return the loss terms that are on, ``(B,)`` each, without weights."""
    terms = {}
    if batch.measured_BG is not None:
        # unmeasured genes are 0 in cells, so predictions of them must not count
        prediction = _without(prediction, batch.measured_BG)
    if config.energy:
        terms["energy"] = energy_distance(prediction.latent_BSO, batch.real_BSO)
    if config.decoder and prediction.genes_BSG is not None and batch.genes_BSG is not None:
        terms["decoder"] = energy_distance(prediction.genes_BSG, batch.genes_BSG)
    real_BSG = batch.real_BSO if batch.genes_BSG is None else batch.genes_BSG
    if config.mae:
        terms["mae"] = pseudobulk_mae(prediction.log1p_BSG, real_BSG)
        targets = _needed(targets, "mae")
        # held-out perturbations and control cells have no training effect, and are compared set by set
        of_effect_B = (_effects(prediction, targets) - targets.effect_BG).abs().mean(-1)
        terms["mae"] = torch.where(targets.has_effect_B, of_effect_B, terms["mae"])
    if config.de:
        terms["de"] = _de_term(prediction, _needed(targets, "de"), config, positive_weight)
    if config.nb:
        rate_BG = _needed(targets, "nb").log_rate_BG
        if prediction.counts is None or batch.depth_BS is None or rate_BG is None:
            raise ValueError("the term nb needs a network with a counts head, control rates and a store of counts")
        terms["nb"] = _counts_loss(prediction.counts, real_BSG, batch, rate_BG)
    if config.rank:
        targets = _needed(targets, "rank")
        if others is None:
            raise ValueError("the term rank needs effects of other perturbations")
        set_effect_BG = real_BSG.float().mean(1) - targets.control_mean_BG
        if targets.measured_BG is not None:
            set_effect_BG = set_effect_BG * targets.measured_BG
        # The mean of all training cells is less noisy than that of a set; held-out perturbations have none.
        real_BG = torch.where(targets.has_effect_B[:, None], targets.effect_BG, set_effect_BG)
        terms["rank"] = _rank(_effects(prediction, targets), real_BG, batch, config, targets, others, gather)
    return terms


def _needed(targets: BatchTargets | None, term: str) -> BatchTargets:
    """Return the targets, which a requested term cannot do without."""
    if targets is None:
        raise ValueError(f"the term {term} needs what the training split says of the sets")
    return targets


def _without(prediction: Prediction, measured_BG: Tensor) -> Prediction:
    """Return the prediction with 0 for unmeasured genes."""
    clipped_effect_BG = None if prediction.clipped_effect_BG is None else prediction.clipped_effect_BG * measured_BG
    if prediction.genes_BSG is None:
        return prediction._replace(
            latent_BSO=prediction.latent_BSO * measured_BG[:, None], clipped_effect_BG=clipped_effect_BG
        )
    return prediction._replace(
        genes_BSG=prediction.genes_BSG * measured_BG[:, None], clipped_effect_BG=clipped_effect_BG
    )


def _counts_loss(found: CountsPrediction, real_BSG: Tensor, batch: Batch, log_rate_BG: Tensor) -> Tensor:
    """Return the counts head's loss; log1p values convert back to the exact whole counts."""
    assert batch.depth_BS is not None
    counts_BSG = (real_BSG.float().expm1() * batch.depth_BS[..., None]).round_()
    log_mean_BG = log_rate_BG + found.log_fold_BG.float()
    log_depth_BS = batch.depth_BS.clamp_min(_SMALLEST_DEPTH).log()
    log_mean_BSG = log_mean_BG[:, None] + log_depth_BS[..., None]
    return negative_binomial_loss(counts_BSG, log_mean_BSG, found.log_shape_G, measured_BG=batch.measured_BG)


def _effects(prediction: Prediction, targets: BatchTargets) -> Tensor:
    """Return the predicted effect of each set, (B, G); 0 for unmeasured genes."""
    effect_BG = prediction.unclipped_BSG.float().mean(1) - targets.reference_mean_BG
    return effect_BG if targets.measured_BG is None else effect_BG * targets.measured_BG


def _de_term(prediction: Prediction, targets: BatchTargets, config: LossConfig, positive_weight: float) -> Tensor:
    """Return the DE loss; a set without a training effect has no labels, and loss 0."""
    if targets.labels_BG is None or targets.valid_BG is None or targets.threshold_BG is None:
        raise ValueError("the term de needs DE labels")
    direction_BG = targets.effect_BG.sign() * targets.labels_BG
    if config.de_head == "order":
        return order_loss(_effects(prediction, targets), direction_BG, _SCALE * targets.threshold_BG.mean(-1))
    if prediction.de_BG is None:
        raise ValueError("a learned DE head is part of the network, and this one has none")
    focal = config.de_form == "focal"
    return de_loss(
        prediction.de_BG,
        targets.labels_BG,
        targets.valid_BG,
        positive_weight=1.0 if focal else positive_weight,
        gamma=config.de_gamma if focal else 0.0,
    )


def _rank(
    pred_BG: Tensor,
    real_BG: Tensor,
    batch: Batch,
    config: LossConfig,
    targets: BatchTargets,
    others: Others,
    gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the ranking loss; sets of control cells have no rank, as in the official metric."""
    is_perturbed_B = ~targets.is_control_B
    codes_B3 = torch.stack([batch.context_B, batch.pert_B, is_perturbed_B.to(batch.pert_B.dtype)], dim=1)
    real_AG, codes_A3 = gather(real_BG), gather(codes_B3)
    comparable_BA = (
        (batch.context_B[:, None] == codes_A3[:, 0])
        & (batch.pert_B[:, None] != codes_A3[:, 1])
        & is_perturbed_B[:, None]
        & codes_A3[:, 2].bool()
    )
    others_BKG = torch.cat([real_AG.expand(len(real_BG), -1, -1), others.effects_BKG], dim=1)
    if targets.measured_BG is not None:
        others_BKG = others_BKG * targets.measured_BG[:, None]
    return ranking_loss(
        pred_BG,
        real_BG,
        others_BKG,
        valid_BK=torch.cat([comparable_BA, others.exist_BK & is_perturbed_B[:, None]], dim=1),
        own_gene_B=targets.own_gene_B,
        distance=config.rank_distance,
        margin=config.rank_margin,
    )


def warm_up(config: LossConfig, step: int) -> float:
    """Return the share of its weight that an auxiliary term has at a step."""
    return min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0


def total_loss(terms: Mapping[str, Tensor], config: LossConfig, *, share: float | Tensor = 1.0) -> Tensor:
    """Return the weighted sum of the terms; auxiliary ones have a share of their weight."""
    parts = [getattr(config, name) * (share if name in _AUXILIARY else 1.0) * value for name, value in terms.items()]
    return torch.stack(parts).sum()
