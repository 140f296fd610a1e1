"""What every run fulfils that cells can be made from: control cells, a target and a context in, predicted cells out.

How cells of a part are drawn, finished and written is none of a predictor's business.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pertcast.data.features import PertFeatures
from pertcast.data.inputs import read_inputs
from pertcast.data.store import Store
from pertcast.data.tensors import as_tensor
from pertcast.generate.binding import batch_codes, is_imported
from pertcast.models.checkpoint import Run
from pertcast.models.state import StateTransition
from pertcast.processes import launched

__all__ = ["NetworkPredictor", "Predictor", "make_predictor"]


class Predictor(Protocol):
    """Predicts cells, each from a control cell of a store."""

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values >= 0, in the order of the control cells.

        Parameters
        ----------
        rows_BS
            Sets of rows of control cells of the context.
        target
            A perturbation, or the store's control label.
        context
            A context of the store.
        """
        ...


def make_predictor(run: Run, store: Store, features: PertFeatures) -> Predictor:
    """Return what predicts a run's cells; weights are read when the first cells are wanted."""
    return NetworkPredictor(run, store, features)


class NetworkPredictor:
    """A State Transition network on one device.

    Parameters
    ----------
    run, store, features
        The network, where control cells are read from, and features of every target.
    device
        Where it computes; default: a GPU where there is one, each process of a machine its own.
    """

    def __init__(self, run: Run, store: Store, features: PertFeatures, *, device: torch.device | None = None) -> None:
        self._run, self._store, self._features = run, store, features
        self._device = device or _own_device()
        self._model: StateTransition | None = None
        self._source = str(run.experiment["model"]["input"])
        # a run that was trained elsewhere, or on other cells first, has genes and batches of its own
        self._input_genes = run.hvg if is_imported(run) or self._source == "hvg" else None
        self._batch_codes = batch_codes(run, store)

    @torch.inference_mode()
    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values; see :class:`Predictor`."""
        run, store = self._run, self._store
        if self._model is None:
            self._model = run.model().to(self._device).eval()
        rows = rows_BS.reshape(-1)
        control_CI = read_inputs(store, rows, source=self._source, genes=self._input_genes)
        code = run.contexts.index(context) if context in run.contexts else -1
        prediction = self._model(
            self._tensor(control_CI.reshape(*rows_BS.shape, -1)),
            self._tensor(self._features.of([target])).expand(len(rows_BS), -1),
            self._tensor(self._batch_codes[store.batch_codes[rows]].reshape(rows_BS.shape)),
            torch.full((len(rows_BS),), code, device=self._device),
        )
        output_CO: NDArray[np.float32] = prediction.log1p_BSG.flatten(0, 1).float().cpu().numpy()
        return output_CO

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        return as_tensor(values).to(self._device)


def _own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks = launched()
    return torch.device("cuda", 0 if ranks is None else ranks.local_rank % torch.cuda.device_count())
