"""What a run's counts head says, in the place of predicted cells: logarithms of how rates change.

Legend of shapes: B sets, S cells in a set, O predicted genes, G genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pertcast.data.features import PertFeatures
from pertcast.data.store import Store
from pertcast.errors import CheckpointError
from pertcast.generate.predict import NetworkPredictor
from pertcast.models.checkpoint import WEIGHTS, Run, load_tensors
from pertcast.models.heads import COUNTS_HEAD_PREFIX, LOG_SHAPES

__all__ = ["CountsHeadPredictor", "shapes_of"]


def shapes_of(run: Run) -> NDArray[np.float64]:
    """Return 1 / dispersion of each gene that a run's counts head predicts, (O,).

    Raises
    ------
    CheckpointError
        If the run has no counts head.
    """
    log_shape_O = load_tensors(run.path / WEIGHTS).get(f"{COUNTS_HEAD_PREFIX}log_shape_G")
    if log_shape_O is None:
        raise CheckpointError(
            f'{run.path}: generate.cells = "nb_head" draws cells from a counts head, and this run has none; train one '
            "with loss.nb above 0, or choose another way to make cells (donors)"
        )
    return log_shape_O.double().clamp(*LOG_SHAPES).exp().numpy()


class CountsHeadPredictor:
    """Says of each cell the logarithms of how its set's rates change; genes that are not predicted stay as they are."""

    def __init__(self, run: Run, store: Store, features: PertFeatures) -> None:
        self._network = NetworkPredictor(run, store, features, counts_head=True)

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes); see :class:`pertcast.generate.predict.Predictor`."""
        counts = self._network.prediction(rows_BS, target=target, context=context).counts
        assert counts is not None
        log_fold_BO = counts.log_fold_BG.float().cpu().numpy()
        return np.repeat(log_fold_BO, rows_BS.shape[1], axis=0)
