"""The effects of the training split: mean log1p of perturbed cells minus that of the control cells of their context.

Invariant: cells that are held out, and control cells of other splits, are never read.
Shapes: N training perturbations (each in its context), C contexts, G predicted genes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.progress import Progress

__all__ = ["TrainingEffects", "training_effects"]

_CELLS_AT_ONCE = 512


class TrainingEffects(NamedTuple):
    """Effects by context and perturbation; a perturbation without control cells in its context has none.

    Attributes
    ----------
    contexts, perts
        (N,) int64 codes of the store, in their order.
    effects_NG
        float32.
    control_mean_CG
        float32, of each context's training control cells; of all contexts together where one has none.
    """

    contexts: NDArray[np.int64]
    perts: NDArray[np.int64]
    effects_NG: NDArray[np.float32]  # noqa: N815
    control_mean_CG: NDArray[np.float32]  # noqa: N815

    def row_of(self) -> dict[tuple[int, int], int]:
        """Return the row of each effect by the codes of its context and perturbation."""
        groups = zip(self.contexts.tolist(), self.perts.tolist(), strict=True)
        return {group: row for row, group in enumerate(groups)}


def training_effects(store: Store, output_genes: NDArray[np.int64], *, progress: Progress) -> TrainingEffects:
    """Read the TRAIN cells once, group by group, and return their effects.

    Parameters
    ----------
    store
        The training store.
    output_genes
        Positions of the predicted genes, ascending.
    progress
        Where groups are counted.
    """
    groups = _training_groups(store)
    genes = None if len(output_genes) == len(store.genes) else output_genes
    control = store.control_code
    named = [key for key in groups if key[1] != control and (key[0], control) in groups]
    with progress.task("training effects", len(groups), "groups") as advance:
        means = {}
        for (context, pert), rows in groups.items():
            means[context, pert] = _mean(store, rows, genes)
            advance(1)
    missing = store.control_mean_log1p if genes is None else store.control_mean_log1p[genes]
    control_mean_CG = np.stack([means.get((code, control), missing) for code in range(len(store.contexts))])
    effects = [means[key] - control_mean_CG[key[0]] for key in named]
    codes = np.array(named, dtype=np.int64).reshape(-1, 2)
    return TrainingEffects(
        contexts=codes[:, 0],
        perts=codes[:, 1],
        effects_NG=np.stack(effects).astype(np.float32) if effects else np.zeros((0, len(output_genes)), np.float32),
        control_mean_CG=control_mean_CG.astype(np.float32),
    )


def _training_groups(store: Store) -> dict[tuple[int, int], NDArray[np.int64]]:
    """Return the rows of each (context, perturbation) of the training split, in the order of codes."""
    rows = store.rows(split=Split.TRAIN)
    keys = store.context_codes[rows].astype(np.int64) * len(store.perts) + store.pert_codes[rows]
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    pieces = np.split(rows[order], starts[1:])
    return {divmod(int(key), len(store.perts)): piece for key, piece in zip(distinct, pieces, strict=True)}


def _mean(store: Store, rows: NDArray[np.int64], genes: NDArray[np.int64] | None) -> NDArray[np.float32]:
    total = np.zeros(len(store.genes), dtype=np.float64)
    for start in range(0, len(rows), _CELLS_AT_ONCE):
        block = store.csr(rows[start : start + _CELLS_AT_ONCE])
        total += np.bincount(block.indices, weights=block.data, minlength=len(total))
    mean = (total / len(rows)).astype(np.float32)
    return mean if genes is None else mean[genes]
