"""The codes of control cells: what a network makes of a cell whatever the target, kept for the next targets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertcast.files.resources import prefetch

_CELLS_AT_ONCE = 128
"""Always as many: sums are then rounded alike, whichever cells are encoded together."""
_READERS = 2
_MOST_BYTES = 256 << 20


class ControlCodes:
    """The codes of a store's cells, each computed when it is first asked for.

    >>> codes = ControlCodes(lambda rows: 2.0 * rows[:, None], torch.from_numpy, width=1, num_cells=9)
    >>> codes.of(np.array([7, 3, 7])).flatten().tolist()
    [14.0, 6.0, 14.0]
    """

    def __init__(
        self,
        read: Callable[[NDArray[np.int64]], NDArray[np.float32]],
        encode: Callable[[NDArray[np.float32]], Tensor],
        *,
        width: int,
        num_cells: int,
        device: torch.device | None = None,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._read, self._encode = read, encode
        self._kept = torch.empty(max(1, min(num_cells, most_bytes // (4 * width))), width, device=device)
        self._place = np.full(num_cells, -1)
        self._used = 0

    def of(self, rows_C: NDArray[np.int64]) -> Tensor:
        """Return the codes of some cells, (C, width)."""
        missing = np.unique(rows_C[self._place[rows_C] < 0])
        if self._used + len(missing) > len(self._kept):
            self._place[:], self._used = -1, 0
            missing = np.unique(rows_C)
            if len(missing) > len(self._kept):
                self._kept = self._kept.new_empty(len(missing), self._kept.shape[1])
        parts = [missing[start : start + _CELLS_AT_ONCE] for start in range(0, len(missing), _CELLS_AT_ONCE)]
        cells = prefetch(parts, lambda some: self._read(np.resize(some, _CELLS_AT_ONCE)), threads=_READERS)
        for some, cells_CI in zip(parts, cells, strict=True):
            stop = self._used + len(some)
            self._kept[self._used : stop] = self._encode(cells_CI)[: len(some)]
            self._place[some] = np.arange(self._used, stop)
            self._used = stop
        return self._kept[torch.from_numpy(self._place[rows_C]).to(self._kept.device)]
