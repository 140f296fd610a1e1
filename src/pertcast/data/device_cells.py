"""Stored cells as tensors on a device, from which any rows become dense log1p values.

Invariant: cells that stay on a device and cells that come from the store for one batch go through one kernel, so both
give the same bits. Shapes: N cells, V stored values, R rows of a batch, G genes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertcast.data.store_arrays import write_rows

# NumPy's unsigned numbers travel as torch's signed ones of the same bits.
_SIGNED = {np.dtype(np.uint16): np.dtype(np.int16), np.dtype(np.uint32): np.dtype(np.int32)}


@dataclass(frozen=True)
class StoredCells:
    """Rows of stored values as tensors."""

    starts: Tensor  # (N + 1,) int64
    columns: Tensor  # (V,) int16 (the bits of uint16) or int32
    values: Tensor  # (V,) counts as uint8, int16 or int32 (the bits of uint16 and uint32), or float32
    factors: Tensor | None  # (N,) float32: what counts are multiplied by before log1p; ``None``: values are log1p

    @classmethod
    def of(cls, stored: tuple[NDArray[Any], ...], factors: NDArray[np.float32] | None) -> StoredCells:
        """Return starts, columns and values as tensors, which share their memory."""
        indptr, columns, values = stored
        columns, values = (array.view(_SIGNED.get(array.dtype, array.dtype)) for array in (columns, values))
        return cls(
            torch.from_numpy(indptr),
            torch.from_numpy(columns),
            torch.from_numpy(values),
            None if factors is None else torch.from_numpy(factors),
        )

    def __len__(self) -> int:
        """Return N."""
        return len(self.starts) - 1

    @property
    def num_bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.starts, self.columns, self.values, self.factors) if tensor is not None]

    def to(self, device: torch.device | str) -> StoredCells:
        """Return the cells on a device; pinned memory is copied while the processor goes on."""
        moved = [tensor.to(device, non_blocking=tensor.is_pinned()) for tensor in self._tensors()]
        return StoredCells(moved[0], moved[1], moved[2], moved[3] if len(moved) > 3 else None)

    def dense(self, rows_R: Tensor, num_genes: int, *, positions_G: Tensor | None = None) -> Tensor:
        """Return log1p values of rows, float32 (R, num_genes).

        `positions_G` is the column of each stored gene, -1 for those that are not wanted.
        """
        dense_RG = torch.zeros(len(rows_R), num_genes, device=rows_R.device)
        if rows_R.device.type == "cpu":
            self._write_on_cpu(rows_R, dense_RG, positions_G)
        elif rows_R.device.type == "cuda" and has_triton():
            from pertcast.data.gather_kernel import gather

            gather(self, rows_R, dense_RG, positions_G)
        else:
            self.write_with_torch(rows_R, dense_RG, positions_G)
        return dense_RG

    def _write_on_cpu(self, rows_R: Tensor, dense_RG: Tensor, positions_G: Tensor | None) -> None:
        starts, columns, values = (_as_stored(tensor) for tensor in (self.starts, self.columns, self.values))
        rows = rows_R.numpy()
        factors = None if self.factors is None else self.factors.numpy()[rows]
        positions = None if positions_G is None else positions_G.numpy()
        write_rows((starts, columns, values), rows, factors, dense_RG.numpy(), positions=positions)

    def write_with_torch(self, rows_R: Tensor, dense_RG: Tensor, positions_G: Tensor | None) -> None:
        """Write log1p values with torch's operations, for devices without a kernel of their own."""
        first_R = self.starts[rows_R]
        length_R = self.starts[rows_R + 1] - first_R
        row_V = torch.repeat_interleave(length_R)
        before_R = length_R.cumsum(0) - length_R
        place_V = torch.arange(len(row_V), device=row_V.device) + (first_R - before_R)[row_V]
        column_V = unsigned(self.columns[place_V]).long()
        value_V = self.values[place_V]
        if self.factors is not None:
            value_V = (unsigned(value_V).float() * self.factors[rows_R][row_V]).log1p()
        if positions_G is not None:
            column_V = positions_G[column_V]
            wanted_V = column_V >= 0
            row_V, column_V, value_V = row_V[wanted_V], column_V[wanted_V], value_V[wanted_V]
        dense_RG[row_V, column_V] = value_V


def _as_stored(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as an array of the numbers that its bits stand for."""
    array = tensor.numpy()
    return array.view(np.uint16) if tensor.dtype == torch.int16 else array


def unsigned(values: Tensor) -> Tensor:
    """Return numbers whose bits are those of uint16 as what they stand for.

    >>> unsigned(torch.tensor([-1, 3], dtype=torch.int16)).tolist()
    [65535, 3]
    """
    return values.int() & 0xFFFF if values.dtype == torch.int16 else values


@cache
def has_triton() -> bool:
    """Return whether kernels can be compiled for the GPU."""
    try:
        import triton  # type: ignore[import-not-found] # noqa: F401
    except ImportError:
        return False
    return torch.cuda.is_available()


def room_for_cells(device: torch.device) -> int:
    """Return how many bytes of cells may stay on a device: half of what is free on a GPU, else none."""
    return int(torch.cuda.mem_get_info(device)[0] // 2) if device.type == "cuda" else 0


class PinnedBuffers:
    """Buffers that the host fills in turns while the device still copies from the ones before."""

    def __init__(self, num: int) -> None:
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(num)]
        self._copied: list[Any] = [None] * num
        self._turn = 0

    def take(self) -> int:
        """Return the number of the next set of buffers, once the device has copied what was in it."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        return self._turn

    def array(self, turn: int, name: str, size: int, dtype: np.dtype) -> NDArray[Any]:
        """Return a buffer as an array of this size; the buffer grows if it is too small."""
        num_bytes = max(size, 1) * dtype.itemsize
        if len(self._buffers[turn].get(name, ())) < num_bytes:
            grown = 1 << math.ceil(math.log2(num_bytes))
            self._buffers[turn][name] = torch.empty(grown, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return self._buffers[turn][name].numpy()[: size * dtype.itemsize].view(dtype)

    def are_being_copied(self, turn: int) -> None:
        """Remember the place in the device's queue after which a set of buffers may be filled again."""
        if torch.cuda.is_available():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[turn] = event
