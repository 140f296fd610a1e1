"""A predictor whose effects are beside its own control condition: what it gets wrong about every cell cancels out.

A network's copies of control cells may miss these by more than effects are large; every gene then looks as if each
target changed it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pertcast.data.store import Store
from pertcast.generate.predict import Predictor

__all__ = ["CentredPredictor"]


class CentredPredictor:
    """Predicts the control cell plus what the target adds to the prediction of the control condition.

    Control cells come out as they are. Values may be below 0. Each cell is predicted twice.

    Parameters
    ----------
    predictor, store
        What predicts, and where control cells are read from.
    output_genes
        Positions of the predicted genes in the store.
    """

    def __init__(self, predictor: Predictor, store: Store, *, output_genes: NDArray[np.int64]) -> None:
        self._predictor, self._store = predictor, store
        self._genes = None if len(output_genes) == len(store.genes) else output_genes

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values; see :class:`pertcast.generate.predict.Predictor`."""
        control_CO: NDArray[np.float32] = self._store.log1p(rows_BS.reshape(-1), genes=self._genes)
        if target != self._store.control:
            control_CO += self._predictor.predict(rows_BS, target=target, context=context)
            control_CO -= self._predictor.predict(rows_BS, target=self._store.control, context=context)
        return control_CO
