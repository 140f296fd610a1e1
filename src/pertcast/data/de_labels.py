"""DE labels of the training split: the genes that each perturbation changes, by the official statistics.

A perturbation is tested within each screen (dataset and context) of its context. Several screens are combined by
Stouffer's method, weighted by cells. Only cells of :attr:`Split.TRAIN` are read, controls too. Labels are cached in the
store's folder and recomputed when the store or the statistics change.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, special

from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.files.artefacts import atomic_file
from pertcast.files.resources import available_cpus
from pertcast.progress import SILENT, Progress
from pertcast.stats.de import FDR, adjust_fdr, rank_sum
from pertcast.stats.groups import group_cells
from pertcast.stats.metrics import is_significant

logger = logging.getLogger(__name__)

LABELS_FILE = "de_labels.npz"
_MAX_VALUES = 1 << 26
_SMALLEST_P = 1e-300
# raised when labels of the same store would come out otherwise
_STATISTICS = 2


class DeLabels(NamedTuple):
    """Labels of N pairs of context and perturbation, sorted by their codes."""

    context: NDArray[np.int32]  # (N,) int32 codes of the store
    pert: NDArray[np.int32]
    significant: NDArray[np.bool_]  # (N, genes) whether the gene is DE at FDR 0.05; False if no screen measured it

    def find(self, context: NDArray[np.integer], pert: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the row of each pair, -1 if there is none (the control, held-out targets)."""
        rows = {pair: row for row, pair in enumerate(zip(self.context.tolist(), self.pert.tolist(), strict=True))}
        asked = zip(np.asarray(context).tolist(), np.asarray(pert).tolist(), strict=True)
        return np.array([rows.get(pair, -1) for pair in asked], dtype=np.int64)


def de_labels(store: Store, *, progress: Progress = SILENT) -> DeLabels:
    """Return the DE labels of a store's training split, from its folder if they are cached."""
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
    tests = np.unique(np.stack([store.screen_codes[perturbed], store.pert_codes[perturbed]]), axis=1).T
    controls = {screen: _rows(store, screen, store.control_code) for screen in np.unique(tests[:, 0]).tolist()}
    tests = tests[[len(controls[screen]) > 0 for screen in tests[:, 0].tolist()]]
    pair_of = {(screen, pert): (store.screens[screen].context, pert) for screen, pert in tests.tolist()}
    num_tests = Counter(pair_of.values())
    tested: dict[tuple[int, int], list[_Tested]] = {pair: [] for pair in num_tests}
    significant: dict[tuple[int, int], NDArray[np.bool_]] = {}
    with progress.task("DE labels", len(tests), "perturbations") as advance:
        for screen in np.unique(tests[:, 0]).tolist():
            control = store.csr(controls[screen])
            theirs = group_cells(control, np.zeros(control.shape[0], dtype=np.int64))
            del control
            measured_G = np.ones(len(store.genes), bool) if store.measured_SG is None else store.measured_SG[screen]
            for perts, cells, codes in _batches(store, screen, tests[tests[:, 0] == screen, 1]):
                ours = group_cells(cells, codes)
                p_value_PG, above_PG = rank_sum(ours, theirs, threads=available_cpus())
                up_PG = np.sign(above_PG - ours.sizes[:, None] * float(theirs.sizes[0]) / 2)
                for place, pert in enumerate(perts):
                    pair, size = pair_of[screen, pert], int(ours.sizes[place])
                    tested[pair].append(_Tested(size, p_value_PG[place], up_PG[place], measured_G))
                    if len(tested[pair]) == num_tests[pair]:
                        significant[pair] = _significant(tested.pop(pair))
                advance(len(perts), store.screen_name(screen))
    pairs = sorted(significant)
    labels_NG = np.array([significant[pair] for pair in pairs]).reshape(-1, len(store.genes))
    codes_N2 = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return DeLabels(codes_N2[:, 0], codes_N2[:, 1], labels_NG)


class _Tested(NamedTuple):
    """The rank-sum tests of one perturbation in one screen: cells, p-values, signs of the change, genes measured."""

    num_cells: int
    p_value_G: NDArray[np.float64]
    sign_G: NDArray[np.float64]
    measured_G: NDArray[np.bool_]


def _significant(tested: list[_Tested]) -> NDArray[np.bool_]:
    """Return which genes are DE over all screens, (G,), by Benjamini-Hochberg over the measured genes."""
    measured_G = np.any([one.measured_G for one in tested], axis=0)
    p_value_G = tested[0].p_value_G
    if len(tested) > 1:
        score_G, cells_G = np.zeros(len(measured_G)), np.zeros(len(measured_G))
        for one in tested:
            size_G = special.ndtri(np.maximum(one.p_value_G, _SMALLEST_P) / 2)
            score_G += one.measured_G * np.sqrt(one.num_cells) * -one.sign_G * size_G
            cells_G += one.measured_G * one.num_cells
        p_value_G = 2 * special.ndtr(-np.abs(score_G) / np.sqrt(np.maximum(cells_G, 1)))
    significant_G = np.zeros(len(measured_G), dtype=bool)
    significant_G[measured_G] = is_significant(adjust_fdr(p_value_G[None, measured_G])[0])
    return significant_G


def _rows(store: Store, screen: int, pert: int) -> NDArray[np.int64]:
    return store.screen_rows(screen, split=Split.TRAIN, pert=pert)


def _batches(
    store: Store, screen: int, perts: NDArray[np.int64]
) -> Iterator[tuple[list[int], sparse.csr_matrix, NDArray[np.int64]]]:
    """Yield perturbations in batches, with their cells and each cell's position among them."""
    blocks: list[sparse.csr_matrix] = []
    some: list[int] = []
    for pert in perts.tolist():
        blocks.append(store.csr(_rows(store, screen, pert)))
        some.append(pert)
        if pert == perts[-1] or sum(block.nnz for block in blocks) > _MAX_VALUES:
            codes = np.repeat(np.arange(len(some)), [block.shape[0] for block in blocks])
            yield some, sparse.vstack(blocks, format="csr"), codes
            blocks, some = [], []


def _save(labels: DeLabels, path: Path, store: Store) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            made_from=np.array(_made_from(store)),
            context=labels.context,
            pert=labels.pert,
            significant=np.packbits(labels.significant, axis=1),
        )


def _made_from(store: Store) -> str:
    return f"{store.fingerprint} FDR {FDR} statistics {_STATISTICS}"


def _load(path: Path, store: Store) -> DeLabels | None:
    """Return cached labels; ``None`` if there are none, or they are damaged or of another store or statistics."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            if str(kept["made_from"]) != _made_from(store):
                return None
            significant = np.unpackbits(kept["significant"], axis=1, count=len(store.genes)).astype(bool)
            return DeLabels(kept["context"], kept["pert"], significant)
    except (OSError, ValueError, EOFError, BadZipFile, KeyError):
        return None
