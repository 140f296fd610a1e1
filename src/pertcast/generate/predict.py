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
from pertcast.models.baselines import Baseline, BaselineSpec, predict_effects
from pertcast.models.checkpoint import Run
from pertcast.models.state import Prediction, StateTransition
from pertcast.processes import launched

__all__ = ["BaselinePredictor", "NetworkPredictor", "Predictor", "make_predictor"]


class Predictor(Protocol):
    """Predicts cells, each from a control cell of a store."""

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values, in the order of the control cells.

        They may be below 0, where an effect takes more than a cell has: the mean over cells is what is predicted, and
        whoever makes cells cuts them off at 0.

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
    """Return the predictor of a run; its weights are read when the first cells are needed."""
    if isinstance(run.spec, BaselineSpec):
        return BaselinePredictor(run, store, features)
    return NetworkPredictor(run, store, features)


class BaseEffects:
    """The effects that a run's baseline predicts in the contexts of a store."""

    def __init__(self, run: Run, baseline: Baseline, store: Store, features: PertFeatures) -> None:
        self._run, self._baseline, self._store, self._features = run, baseline, store, features

    def of(self, target: str, context: str) -> NDArray[np.float32]:
        """Return (output genes,) log1p differences; 0 for the control label."""
        if target == self._store.control:
            return np.zeros(self._baseline.spec.num_genes, dtype=np.float32)
        code = self._run.contexts.index(context) if context in self._run.contexts else -1
        effect_PG = predict_effects(self._baseline, self._features.of([target]), context=code)
        return effect_PG.reshape(-1)


class BaselinePredictor:
    """A fitted baseline: the control cell plus the effect of the target."""

    def __init__(self, run: Run, store: Store, features: PertFeatures) -> None:
        baseline = run.baseline()
        assert baseline is not None
        self._run, self._store, self._effects = run, store, BaseEffects(run, baseline, store, features)

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values; see :class:`Predictor`."""
        is_whole = len(self._run.output_genes) == len(self._store.genes)
        control_CO = self._store.log1p(rows_BS.reshape(-1), genes=None if is_whole else self._run.output_genes)
        return control_CO + self._effects.of(target, context)


class NetworkPredictor:
    """A State Transition network on one device.

    Parameters
    ----------
    run, store, features
        The network, where control cells are read from, and features of every target.
    device
        Where it computes; default: a GPU where there is one, each process of a machine its own.
    counts_head
        Whether the counts head, which the run must have, says something, too.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        features: PertFeatures,
        *,
        device: torch.device | None = None,
        counts_head: bool = False,
    ) -> None:
        self._counts_head = counts_head
        self._run, self._store, self._features = run, store, features
        self._device = device or _own_device()
        self._model: StateTransition | None = None
        self._source = str(run.experiment["model"]["input"])
        # a run that was trained elsewhere, or on other cells first, has genes and batches of its own
        self._input_genes = run.hvg if is_imported(run) or self._source == "hvg" else None
        self._batch_codes = batch_codes(run, store)
        baseline = run.baseline()
        self._base = BaseEffects(run, baseline, store, features) if baseline is not None else None

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values; see :class:`Predictor`."""
        prediction = self.prediction(rows_BS, target=target, context=context)
        return prediction.uncut_BSG.flatten(0, 1).float().cpu().numpy()

    @property
    def network(self) -> StateTransition:
        """The network, on its device."""
        if self._model is None:
            self._model = self._run.model(counts_head=self._counts_head).to(self._device).eval()
        return self._model

    @torch.inference_mode()
    def prediction(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> Prediction:
        """Return all that the network says of sets of rows of control cells."""
        inputs_CI = read_inputs(self._store, rows_BS.reshape(-1), source=self._source, genes=self._input_genes)
        batch_C = self._batch_codes[self._store.batch_codes[rows_BS.reshape(-1)]]
        context_code = self._run.contexts.index(context) if context in self._run.contexts else -1
        num_sets = len(rows_BS)
        return self.network(
            self._tensor(inputs_CI).reshape(*rows_BS.shape, -1),
            self._tensor(self._features.of([target])).expand(num_sets, -1),
            self._tensor(batch_C.reshape(rows_BS.shape)),
            torch.full((num_sets,), context_code, device=self._device),
            base_BG=self._base_of(target, context, num_sets=num_sets),
        )

    def _base_of(self, target: str, context: str, *, num_sets: int) -> torch.Tensor | None:
        return None if self._base is None else self._tensor(self._base.of(target, context)).expand(num_sets, -1)

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        return as_tensor(values).to(self._device)


def _own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks = launched()
    return torch.device("cuda", 0 if ranks is None else ranks.local_rank % torch.cuda.device_count())
