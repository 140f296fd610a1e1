"""DE labels of the training split: which genes each perturbation changes in each context, by the official statistics.

Invariant: only cells of :attr:`Split.TRAIN`, controls too, are read; labels are kept in the store's folder, and made
again where the store is another one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import DataError, Problem
from pertcast.files.artefacts import atomic_file
from pertcast.files.cpus import available_cpus
from pertcast.progress import SILENT, Progress
from pertcast.stats.de import differential_expression
from pertcast.stats.groups import group_cells
from pertcast.stats.metrics import is_significant

__all__ = ["LABELS_FILE", "DeLabels", "de_labels"]

logger = logging.getLogger(__name__)

LABELS_FILE = "de_labels.npz"
_MAX_VALUES = 1 << 26


@dataclass(frozen=True, eq=False)
class DeLabels:
    """Labels of N pairs of a context and a perturbation, sorted by their codes.

    Attributes
    ----------
    context, pert
        (N,) int32 codes of the store.
    num_cells
        (N,) int64 training cells that the label rests on.
    significant
        (N, genes) whether the gene is DE at FDR 0.05.
    log2_fold_change
        (N, genes) float32, infinite where one side has none.
    """

    context: NDArray[np.int32]
    pert: NDArray[np.int32]
    num_cells: NDArray[np.int64]
    significant: NDArray[np.bool_]
    log2_fold_change: NDArray[np.float32]

    def find(self, context: NDArray[np.int32], pert: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the row of each asked pair, -1 where there is none (the control, what is held out)."""
        rows = {pair: row for row, pair in enumerate(zip(self.context.tolist(), self.pert.tolist(), strict=True))}
        asked = zip(np.asarray(context).tolist(), np.asarray(pert).tolist(), strict=True)
        return np.array([rows.get(pair, -1) for pair in asked], dtype=np.int64)


def de_labels(store: Store, *, progress: Progress = SILENT) -> DeLabels:
    """Return the DE labels of a store's training split, from its folder where they are there already.

    Raises
    ------
    DataError
        If a context has training perturbations but no training control cells.
    """
    kept = store.path / LABELS_FILE
    found = _load(kept, store)
    if found is not None:
        return found
    labels = _compute(store, progress)
    try:
        _save(labels, kept, store)
    except PermissionError:
        logger.warning("%s cannot be written: DE labels are computed again next time", kept)
    return labels


def _compute(store: Store, progress: Progress) -> DeLabels:
    trained = (store.split & int(Split.TRAIN)) > 0
    perturbed = trained & (store.pert_codes != store.control_code)
    pairs = np.unique(np.stack([store.context_codes[perturbed], store.pert_codes[perturbed]]), axis=1).astype(np.int32)
    contexts = np.unique(pairs[0]).tolist()
    without = [store.contexts[context] for context in contexts if not len(_rows(store, context, store.control_code))]
    if without:
        message = f"no training control cells ({store.control!r}) in the contexts {', '.join(without)}"
        remedy = "give these contexts control cells, or hold their perturbations out"
        raise DataError(problems=[Problem(str(store.path), message, remedy)])
    shape = pairs.shape[1], len(store.genes)
    num_cells = np.zeros(shape[0], dtype=np.int64)
    significant, fold_change = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.float32)
    with progress.task("DE labels", shape[0], "perturbations") as advance:
        for context in contexts:
            mine = np.flatnonzero(pairs[0] == context)
            control = store.csr(_rows(store, context, store.control_code))
            theirs = group_cells(control, np.zeros(control.shape[0], dtype=np.int64))
            del control
            for rows, cells, codes in _batches(store, context, mine, pairs[1]):
                ours = group_cells(cells, codes)
                table = differential_expression(ours, theirs, threads=available_cpus())
                num_cells[rows] = ours.sizes
                significant[rows] = is_significant(table.fdr)
                fold_change[rows] = table.log2_fold_change
                advance(len(rows), store.contexts[context])
    return DeLabels(pairs[0], pairs[1], num_cells, significant, fold_change)


def _rows(store: Store, context: int, pert: int) -> NDArray[np.int64]:
    return store.rows(split=Split.TRAIN, context=context, pert=pert)


def _batches(
    store: Store, context: int, mine: NDArray[np.int64], perts: NDArray[np.int32]
) -> Iterator[tuple[list[int], sparse.csr_matrix, NDArray[np.int64]]]:
    """Yield label rows, their cells and each cell's place among those rows, some perturbations at a time."""
    blocks: list[sparse.csr_matrix] = []
    rows: list[int] = []
    for row in mine.tolist():
        blocks.append(store.csr(_rows(store, context, int(perts[row]))))
        rows.append(row)
        if row == mine[-1] or sum(block.nnz for block in blocks) > _MAX_VALUES:
            codes = np.repeat(np.arange(len(rows)), [block.shape[0] for block in blocks])
            yield rows, sparse.vstack(blocks, format="csr"), codes
            blocks, rows = [], []


def _save(labels: DeLabels, path: Path, store: Store) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            store=np.array(store.fingerprint),
            context=labels.context,
            pert=labels.pert,
            num_cells=labels.num_cells,
            significant=np.packbits(labels.significant, axis=1),
            log2_fold_change=labels.log2_fold_change,
        )


def _load(path: Path, store: Store) -> DeLabels | None:
    """Return kept labels; ``None`` where there are none, of another store, or damaged ones."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            if str(kept["store"]) != store.fingerprint:
                return None
            significant = np.unpackbits(kept["significant"], axis=1, count=len(store.genes)).astype(bool)
            names = "context", "pert", "num_cells", "log2_fold_change"
            return DeLabels(significant=significant, **{name: kept[name] for name in names})
    except (OSError, ValueError, EOFError, BadZipFile, KeyError):
        return None
