"""What the network reads of a cell: all genes, the highly variable ones, or an embedding of ``obsm``."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

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


def input_dim(store: Store, *, source: str) -> int:
    """Return the width of what the network reads."""
    if source.startswith(_OBSM):
        key = source.removeprefix(_OBSM)
        if key not in store.embedding_keys:
            there = ", ".join(store.embedding_keys) or "none"
            raise ConfigError(
                f"[model] input: the store {store.path} has no embedding {key!r} (it has {there}); "
                "prepare it again with this experiment"
            )
        return int(store.embedding(np.zeros(1, dtype=np.int64), key).shape[1])
    return len(store.hvg) if source == "hvg" else len(store.genes)


def as_tensor(values: NDArray[np.generic]) -> Tensor:
    """Return the values as a tensor of the same shape; it may share their memory.

    >>> as_tensor(np.arange(3)).tolist()
    [0, 1, 2]
    """
    tensor = torch.from_numpy(values)
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


class SparseCells:
    """Cells that travel to a device as stored values and become a dense tensor there.

    >>> SparseCells(sparse.csr_matrix([[0.0, 2.0], [3.0, 0.0]], dtype=np.float32), (2, 1)).to("cpu").tolist()
    [[[0.0, 2.0]], [[3.0, 0.0]]]
    """

    def __init__(self, cells: sparse.csr_matrix, shape: tuple[int, ...]) -> None:
        self.shape = (*shape, cells.shape[1])
        stored = (np.diff(cells.indptr), cells.indices, cells.data)
        # Memory that the device copies from by itself, while the processor goes on.
        is_pinned = torch.cuda.is_available()
        self._stored = tuple(tensor.pin_memory() if is_pinned else tensor for tensor in map(torch.from_numpy, stored))

    def to(self, device: torch.device | str) -> Tensor:
        """Return the dense tensor on a device, float32 ``(*shape, genes)``."""
        device = torch.device(device)
        counts, columns, values = (part.to(device, non_blocking=device.type == "cuda") for part in self._stored)
        starts = torch.arange(len(counts), device=device) * self.shape[-1]
        places = torch.repeat_interleave(starts, counts, output_size=len(values)) + columns
        dense = torch.zeros(len(counts) * self.shape[-1], dtype=values.dtype, device=device)
        return dense.scatter_(0, places, values).view(self.shape)
