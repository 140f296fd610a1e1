"""What training does to a batch before the network sees it: sets of no known batch, and noise on features.

Invariant: every draw is keyed by the seed and the set's own key, so it does not hang on devices or on other sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pertcast.config import TrainConfig
from pertcast.stats.draws import generator
from pertcast.train.batches import Batch, SetReader

__all__ = ["blur_features", "disturb", "forget_batches"]


def disturb(batch: Batch, reader: SetReader, config: TrainConfig, keys: Sequence[tuple[str | int, ...]]) -> Batch:
    """Return a batch as training shows it.

    Parameters
    ----------
    batch, reader
        The batch, and who read it.
    config
        `unknown_batch`: the share of sets that are shown as of no known batch, where the network has a row for that.
        `feature_noise`: how much noise each set has on its perturbation's feature.
    keys
        One for each set.
    """
    if config.unknown_batch and reader.spec.unknown_batch:
        draws = [generator(config.seed, "no batch", *key).random() for key in keys]
        batch = forget_batches(batch, [draw < config.unknown_batch for draw in draws])
    if config.feature_noise:
        width = batch.pert_BF.shape[1]
        noise_BF = np.stack([generator(config.seed, "feature noise", *key).normal(size=width) for key in keys])
        noise_BF *= config.feature_noise * reader.feature_size
        batch = blur_features(batch, torch.from_numpy(noise_BF), control_code=reader.control_code)
    return batch


def forget_batches(batch: Batch, forgotten: Sequence[bool]) -> Batch:
    """Return a batch of which some sets are of no known batch (code -1)."""
    return batch._replace(batch_BS=torch.where(torch.tensor(forgotten)[:, None], -1, batch.batch_BS))


def blur_features(batch: Batch, noise_BF: Tensor, *, control_code: int) -> Batch:
    """Return a batch whose sets are shown with noise on their perturbation features; control sets have none."""
    is_perturbed_B1 = (batch.pert_B != control_code)[:, None]
    return batch._replace(pert_BF=batch.pert_BF + noise_BF.to(batch.pert_BF.dtype) * is_perturbed_B1)
