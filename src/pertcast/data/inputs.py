"""What the network reads of a cell: all genes, the highly variable ones, or an embedding of ``obsm``."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertcast.data.device_cells import PinnedBuffers, StoredCells
from pertcast.data.store import ALIGNMENT_BYTES, Store
from pertcast.errors import ConfigError

_OBSM = "obsm:"


def read_inputs(
    store: Store, rows: NDArray[np.int64], *, source: str, genes: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Return what the network reads of some cells."""
    if source.startswith(_OBSM):
        return store.embedding(rows, source.removeprefix(_OBSM))
    if genes is None and source == "hvg":
        genes = store.hvg
    return store.log1p(rows, genes=genes)


def as_tensor(values: NDArray[np.generic]) -> Tensor:
    """Return the values as a tensor of the same shape; it may share their memory.

    >>> as_tensor(np.arange(3)).tolist()
    [0, 1, 2]
    """
    tensor = torch.from_numpy(values)
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


def pinned(tensor: Tensor) -> Tensor:
    """Return a tensor in pinned memory, from which a GPU copies while the processor goes on."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class PackedCells(NamedTuple):
    """Stored values of the cells of one batch, in buffers from which a device copies them."""

    cells: StoredCells
    buffers: PinnedBuffers
    turn: int

    def to(self, device: torch.device) -> StoredCells:
        """Return the stored values on a device; the buffers are free again when it has copied them."""
        cells = self.cells.to(device)
        self.buffers.are_being_copied(self.turn)
        return cells


Values = Tensor | PackedCells | None
"""What the host has read for a batch: dense values, stored ones, or nothing where the cells are on the device."""
Way = Literal["dense", "packed", "resident"]
_NUM_BUFFERS = 3  # One that the device copies from, one that waits, one that is filled


class CellSource:
    """Some genes, or an embedding, of a store's cells, as dense tensors on a device.

    Cells get there in one of three ways: ``dense``, made on the host; ``packed``, as the stored values of each batch;
    or ``resident``, all at once.
    """

    def __init__(self, store: Store, *, genes: NDArray[np.int64] | None = None, key: str | None = None) -> None:
        self._store, self._genes, self._key = store, genes, key
        if key is not None:
            self.width = int(store.embedding(np.zeros(1, dtype=np.int64), key).shape[1])
        else:
            self.width = len(store.genes) if genes is None else len(genes)
        self._way: Way = "dense"
        self._device = torch.device("cpu")
        self._cells: StoredCells | Tensor | None = None
        self._positions_G: Tensor | None = None
        self._buffers = PinnedBuffers(_NUM_BUFFERS)

    @property
    def num_bytes(self) -> int:
        """What the cells take on a device where they stay."""
        if self._key is not None:
            return self._store.num_cells * self.width * 4
        return self._store.stored_values(self._genes)[0].num_bytes

    def place(self, device: torch.device, way: Way) -> None:
        """Choose where dense values are made, and how cells get there."""
        self._device, self._way = device, way
        if self._key is None:
            values, positions = self._store.stored_values(self._genes)
            self._positions_G = None if positions is None else torch.from_numpy(positions).to(device)
            if way == "resident":
                with self._store.reading():
                    self._cells = StoredCells.of(values.arrays, self._store.factors()).to(device)
        elif way == "resident":
            rows = np.arange(self._store.num_cells)
            self._cells = torch.from_numpy(self._store.embedding(rows, self._key)).to(device)

    def fetch(self, rows_R: NDArray[np.int64]) -> Values:
        """Do the host's part for a batch of rows."""
        if self._way == "resident":
            return None
        if self._key is not None:
            return pinned(as_tensor(self._store.embedding(rows_R, self._key)))
        if self._way == "dense":
            return as_tensor(self._store.log1p(rows_R, genes=self._genes))
        turn = self._buffers.take()
        values, _ = self._store.stored_values(self._genes)
        with self._store.reading():
            packed = values.pack(rows_R, partial(self._buffers.array, turn))
        return PackedCells(StoredCells.of(packed, self._store.factors(rows_R)), self._buffers, turn)

    def dense(self, rows_R: Tensor, fetched: Values) -> Tensor:
        """Return the dense values of rows of the device, float32 (R, width)."""
        if isinstance(fetched, Tensor):
            return fetched.to(self._device, non_blocking=True)
        if isinstance(fetched, PackedCells):
            cells, rows_R = fetched.to(self._device), torch.arange(len(rows_R), device=self._device)
        elif isinstance(self._cells, StoredCells):
            cells = self._cells
        else:
            assert self._cells is not None
            return self._cells[rows_R]
        return cells.dense(rows_R, self.width, positions_G=self._positions_G)


def source_of(store: Store, source: str) -> CellSource:
    """Return where ``model.input`` or ``model.output`` comes from."""
    if not source.startswith(_OBSM):
        return CellSource(store, genes=store.hvg if source == "hvg" else None)
    key = source.removeprefix(_OBSM)
    if key not in store.embedding_keys:
        there = ", ".join(store.embedding_keys) or "none"
        raise ConfigError(
            f"[model] input: the store {store.path} has no embedding {key!r} (it has {there}); "
            "prepare it again with this experiment"
        )
    return CellSource(store, key=key)
