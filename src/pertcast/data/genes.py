"""The genes of a store: the list that they follow, and where each of a file's columns goes in it.

Invariants: the order is the list's; a gene that a file lacks is an error, or is asked for by name and noted.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.frames import near_misses

__all__ = ["GeneMap", "map_genes", "read_gene_names"]

_NUM_NAMED = 10


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED:,} more" if len(names) > _NUM_NAMED else "")


def read_gene_names(path: Path, *, header: str | None) -> tuple[str, ...]:
    """Return the genes of a gene list: the first column of a CSV, without the header where it has one.

    Raises
    ------
    DataError
        If the file cannot be read, is empty, or names a gene twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            genes = [row[0].strip() for row in csv.reader(stream) if row and row[0].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = Problem(str(path), f"cannot be read ({error})", "give the gene list of the season, one gene a line")
        raise DataError(problems=[problem]) from error
    if genes and genes[0] == header:
        genes = genes[1:]
    repeated = [gene for gene, times in Counter(genes).items() if times > 1]
    if repeated or not genes:
        message = f"genes named twice: {_some(repeated)}" if repeated else "there is no gene in it"
        raise DataError(problems=[Problem(str(path), message, "give the gene list of the season, one gene a line")])
    return tuple(genes)


class GeneMap:
    """Takes blocks of a file's genes to the store's genes.

    Parameters
    ----------
    position
        For each column of the file the position in the store's genes, or -1, int32.
    num_genes
        Genes of the store.
    """

    def __init__(self, position: np.ndarray, num_genes: int) -> None:
        self._position = position
        self._num_genes = num_genes
        self._same = len(position) == num_genes and bool((position == np.arange(num_genes)).all())
        kept = position[position >= 0]
        self._ordered = bool((np.diff(kept) > 0).all())

    def apply(self, block: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return the block (n, store's genes) with sorted columns and without explicit zeros."""
        data, indices, indptr = block.data, block.indices, block.indptr.astype(np.int64)
        if not self._same:
            indices = self._position[indices]
        kept = data != 0 if self._same else (data != 0) & (indices >= 0)
        if not kept.all():
            before = np.concatenate([[0], np.cumsum(kept)])
            data, indices, indptr = data[kept], indices[kept], before[indptr]
        result = sparse.csr_matrix((data, indices, indptr), shape=(block.shape[0], self._num_genes), copy=False)
        if not self._ordered:
            result.sort_indices()
        return result


def map_genes(
    path: Path, file_genes: Sequence[str], genes: Sequence[str], *, fill_missing: bool
) -> tuple[GeneMap, list[str], Problem | None]:
    """Return where a file's genes go, notes on what is dropped or filled with zeros, and what is wrong.

    Parameters
    ----------
    path, file_genes
        The file, and its genes.
    genes
        The genes of the store.
    fill_missing
        Whether genes that the file lacks count as 0 (``prepare.missing_genes = "zero"``).
    """
    place_of = {gene: place for place, gene in enumerate(genes)}
    position = np.array([place_of.get(gene, -1) for gene in file_genes], dtype=np.int32)
    here = set(file_genes)
    missing = [gene for gene in genes if gene not in here]
    extra = [gene for gene in file_genes if gene not in place_of]
    notes = [f"{path.name}: {len(extra):,} genes that are not in the gene list were dropped: {_some(extra)}"] * bool(
        extra
    )
    if not missing:
        return GeneMap(position, len(genes)), notes, None
    if fill_missing and len(missing) < len(genes):
        notes.append(f"{path.name}: {len(missing):,} genes that it lacks count as 0 in its cells: {_some(missing)}")
        return GeneMap(position, len(genes)), notes, None
    near = [f"{gene} is there as {close[0]}" for gene in missing[:3] if (close := near_misses(gene, extra, num=1))]
    remedy = "name its genes as the list does" + (f" ({'; '.join(near)})" if near else "")
    if len(missing) < len(genes):
        remedy += ', or set prepare.missing_genes = "zero" to count them as 0'
    message = f"it lacks {len(missing):,} of the {len(genes):,} genes of the list: {_some(missing)}"
    return GeneMap(position, len(genes)), notes, Problem(f"{path}, var_names", message, remedy)
