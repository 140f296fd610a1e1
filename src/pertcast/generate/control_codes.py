"""The codes of control cells: what a network makes of a cell whatever the target, kept for the next targets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CELLS_AT_ONCE = 128
"""Always as many: sums are then rounded alike, whichever cells are encoded together."""
_MOST_BYTES = 256 << 20


class ControlCodes:
    """The codes of a store's cells, each computed when it is first asked for.

    >>> codes = ControlCodes(lambda rows: torch.from_numpy(rows[:, None]).float() * 2, width=1, num_cells=100)
    >>> codes.of(np.array([7, 3, 7])).flatten().tolist()
    [14.0, 6.0, 14.0]
    """

    def __init__(
        self,
        encode: Callable[[NDArray[np.int64]], Tensor],
        *,
        width: int,
        num_cells: int,
        device: torch.device | None = None,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._encode = encode
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
        for start in range(0, len(missing), _CELLS_AT_ONCE):
            some = missing[start : start + _CELLS_AT_ONCE]
            stop = self._used + len(some)
            self._kept[self._used : stop] = self._encode(np.resize(some, _CELLS_AT_ONCE))[: len(some)]
            self._place[some] = np.arange(self._used, stop)
            self._used = stop
        return self._kept[torch.from_numpy(self._place[rows_C]).to(self._kept.device)]
