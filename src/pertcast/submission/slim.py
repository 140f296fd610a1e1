"""The slim form of a prediction, which is what is packed: X as CSR float32, the season's labels, names, nothing else.

Invariants: a file that is slim already is never copied; any other is rewritten in blocks, genes in the season's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pertcast.files.frames import reading
from pertcast.files.h5ad import CsrWriter, H5adReader, open_h5ad
from pertcast.progress import Progress
from pertcast.seasons import Season

__all__ = ["is_canonical", "rewrite_canonical"]

_BLOCK_VALUES = 1 << 21
_BYTES_PER_VALUE = 8
_SLACK_BYTES = 1 << 24
_ENCODINGS = ("csr_matrix", b"csr_matrix")


def is_canonical(reader: H5adReader, season: Season, genes: Sequence[str]) -> bool:
    """Return whether an open file is just what is to be packed; the order of column indices is not looked at."""
    plain = reader.layout == "csr" and reader.dtype == np.float32 and reader.obs_columns == _columns(season)
    if not plain or reader.genes != tuple(genes):
        return False
    if not np.array_equal(reader.obs_names(), np.arange(reader.num_cells).astype(str).astype(object)):
        return False
    with h5py.File(reader.path, "r") as file, reading(reader.path, "X"):
        others = [node for name, node in file.items() if name not in ("X", "obs", "var")]
        alone = all(isinstance(node, h5py.Group) and not len(node) for node in others)
        matrix = file["X"]
        parts = set(matrix) == {"data", "indices", "indptr"} and matrix.attrs.get("encoding-type") in _ENCODINGS
        unfiltered = parts and all(not matrix[name].id.get_create_plist().get_nfilters() for name in matrix)
        narrow = parts and matrix["indices"].dtype == np.int32
        labelled = all(isinstance(file["obs"][column], h5py.Group) for column in _columns(season))
        bare = len(file["var"]) == 1 and len(file["obs"]) == 1 + len(_columns(season))
    most = reader.num_stored * _BYTES_PER_VALUE * 1.01 + reader.num_cells * 64 + reader.num_genes * 64 + _SLACK_BYTES
    return bool(alone and unfiltered and narrow and labelled and bare) and reader.path.stat().st_size <= most


def _columns(season: Season) -> tuple[str, ...]:
    """Return the columns of obs that are packed."""
    return (season.pert_column, season.context_column) if season.context_column else (season.pert_column,)


def rewrite_canonical(
    path: Path, out: Path, *, season: Season, genes: Sequence[str], normalise: bool, progress: Progress
) -> int:
    """Write the cells with nothing but what is packed.

    Parameters
    ----------
    path
        The prediction, in any form, with the genes of `genes` in any order.
    out
        Where to write; give a temporary name.
    season
        Whose labels are kept.
    genes
        The season's genes in their order.
    normalise
        Whether counts are scaled to the median of the cells' totals and log1p is taken.

    Returns
    -------
    The stored values of the file that was written.
    """
    stored = 0
    with open_h5ad(path) as reader, CsrWriter(out, genes) as writer:
        totals = _totals(reader) if normalise else None
        median = np.float32(1.0) if totals is None else np.median(totals)
        with progress.task("slim down", reader.num_cells, "cells") as advance:
            for first, block in _ordered(reader, genes):
                if totals is not None:
                    block = _normalised(block, totals[first : first + block.shape[0]], median)
                writer.append(block)
                stored += int(np.count_nonzero(block.data))
                advance(block.shape[0])
        labels = {name: pd.Categorical(np.asarray(reader.obs(name), dtype=object)) for name in _columns(season)}
        names = pd.RangeIndex(reader.num_cells).astype(str)
        writer.finish(pd.DataFrame(labels, index=names))
    return stored


def _ordered(reader: H5adReader, genes: Sequence[str]) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield row blocks with the columns in the order of `genes`."""
    if reader.genes == tuple(genes):
        yield from reader.chunks(max_values=_BLOCK_VALUES)
        return
    place = {gene: number for number, gene in enumerate(genes)}
    new = np.array([place[gene] for gene in reader.genes], dtype=np.int32)
    for first, block in reader.chunks(max_values=_BLOCK_VALUES):
        moved = sparse.csr_matrix((block.data, new[block.indices], block.indptr), shape=block.shape)
        moved.has_sorted_indices = False
        moved.sort_indices()
        yield first, moved


def _totals(reader: H5adReader) -> NDArray[np.float32]:
    """Return the counts of each cell, (num_cells,) float32."""
    sums = [np.asarray(block.sum(axis=1)).ravel() for _, block in reader.chunks(max_values=_BLOCK_VALUES)]
    return np.concatenate(sums).astype(np.float32)


def _normalised(block: sparse.csr_matrix, totals: NDArray[np.float32], median: np.floating) -> sparse.csr_matrix:
    """Return log1p(counts / (total / median)), in float32 at every step, so that it equals the official packer's."""
    factors = (totals / median).astype(np.float32)
    factors[factors == 0] = 1
    data = np.log1p(block.data.astype(np.float32) / np.repeat(factors, np.diff(block.indptr)))
    return sparse.csr_matrix((data, block.indices, block.indptr), shape=block.shape)
