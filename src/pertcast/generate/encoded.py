"""Control cells that are encoded once and serve many targets, where a network allows it.

Invariant: a cell's numbers hang on the store and the weights alone, and not on what is asked for, or in which order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pertcast.data.store import Store
from pertcast.models.folded import FoldedNetwork, can_fold
from pertcast.models.spec import StateSpec

if TYPE_CHECKING:
    from pertcast.generate.predict import NetworkPredictor

__all__ = ["EncodedControls", "FoldedPredictor"]

_BLOCK = 512
_MOST_BYTES = 512 << 20


class EncodedControls:
    """Encoded control cells of a store, found in blocks of fixed cells when one of them is asked for first.

    Parameters
    ----------
    store
        Where they are.
    network
        What encodes them.
    read
        Gives what the network reads of rows of the store, (cells, I).
    """

    def __init__(self, store: Store, network: FoldedNetwork, read: Callable[[NDArray[np.int64]], torch.Tensor]) -> None:
        self._network, self._read = network, read
        self._rows = _control_rows(store)
        self._place = np.full(store.num_cells, -1, dtype=np.int64)
        self._place[self._rows] = np.arange(len(self._rows))
        self._is_done = np.zeros(-(-len(self._rows) // _BLOCK), dtype=bool)
        self._encoded_NE: torch.Tensor | None = None

    @staticmethod
    def pays(spec: StateSpec, store: Store, num_cells: int) -> bool:
        """Return whether so many predicted cells are worth encoding all control cells, and these fit into memory."""
        if not can_fold(spec):
            return False
        num_controls = len(_control_rows(store))
        num_bytes = num_controls * (spec.hidden + spec.output_dim // 8) * 4
        return num_cells >= num_controls and num_bytes <= _MOST_BYTES

    def of(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Return the encoded cells of rows, which must be control cells, (cells, E)."""
        places = self._place[rows]
        if (places < 0).any():
            raise IndexError("expected rows of control cells")
        for block in np.unique(places // _BLOCK).tolist():
            if not self._is_done[block]:
                part = slice(block * _BLOCK, (block + 1) * _BLOCK)
                encoded_NE = self._network.encode(self._read(self._rows[part]))
                if self._encoded_NE is None:
                    self._encoded_NE = encoded_NE.new_empty((len(self._rows), encoded_NE.shape[1]))
                self._encoded_NE[part] = encoded_NE
                self._is_done[block] = True
        assert self._encoded_NE is not None
        return self._encoded_NE[torch.from_numpy(places).to(self._encoded_NE.device)]


def _control_rows(store: Store) -> NDArray[np.int64]:
    return np.flatnonzero(store.pert_codes == store.control_code)


class FoldedPredictor:
    """A network for which :func:`pertcast.models.folded.can_fold` holds, with control cells that are encoded once."""

    def __init__(self, predictor: NetworkPredictor, store: Store) -> None:
        self._predictor, self._store = predictor, store
        self._ready: tuple[FoldedNetwork, EncodedControls] | None = None

    @torch.inference_mode()
    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values; see :class:`Predictor`."""
        if self._ready is None:
            folded = FoldedNetwork(self._predictor.network)
            self._ready = folded, EncodedControls(self._store, folded, self._predictor.read)
        folded, encoded = self._ready
        cells_BSO = folded.predict(
            encoded.of(rows_BS.reshape(-1)).reshape(*rows_BS.shape, -1),
            *self._predictor.conditions(rows_BS, target=target, context=context),
        )
        output_CO: NDArray[np.float32] = cells_BSO.flatten(0, 1).float().cpu().numpy()
        return output_CO
