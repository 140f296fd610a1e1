"""What a control cell is read as: all genes, the highly variable ones, or an embedding of ``obsm``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pertcast.data.store import Store
from pertcast.errors import ConfigError

__all__ = ["input_dim", "read_inputs"]

_OBSM = "obsm:"


def read_inputs(
    store: Store, rows: NDArray[np.int64], *, source: str, genes: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Return what the network reads of some cells.

    Parameters
    ----------
    store
        The training store.
    rows
        (cells,) rows of the store, in any order.
    source
        ``genes`` or ``hvg`` (log1p values), or ``obsm:NAME``.
    genes
        Positions of the genes to read, in order, in place of the store's own choice; ignored with an embedding.

    Returns
    -------
    (cells, :func:`input_dim`) float32.
    """
    if source.startswith(_OBSM):
        return store.embedding(rows, source.removeprefix(_OBSM))
    if genes is None and source == "hvg":
        genes = store.hvg
    return store.log1p(rows, genes=genes)


def input_dim(store: Store, *, source: str) -> int:
    """Return the width of what the network reads.

    Raises
    ------
    ConfigError
        If the store has no such embedding.
    """
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
