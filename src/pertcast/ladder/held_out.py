"""The truth of a fold: its held-out cells beside the training control cells, and reference scores.

A fold's ranking (PDS) is among all perturbations that any fold holds out in the context, so the number of folds does
not change what a rank means. The other metrics are of the fold's own targets. If cells are generated as counts, the
truth is counts too, and each file is normalised by its own median total, as the official scorer does. Nothing of a
prediction is normalised to what only the truth or the store knows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pertcast.config import Experiment
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import DataError
from pertcast.files.artefacts import atomic_file, read_json, write_json
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.files.scales import normalise_log1p
from pertcast.generate.plan import control_rows
from pertcast.ladder.mean_baseline import constant_side
from pertcast.ladder.score import compare_sides
from pertcast.ladder.scored_side import PseudobulkStats, read_halves, read_side, select_perts
from pertcast.progress import Progress
from pertcast.seasons import Season
from pertcast.stats.metrics import discrimination

Scores = dict[str, dict[str, dict[str, float]]]
"""Screen ("dataset.context") → target → metric → value."""

_CELLS_AT_ONCE = 1024


@dataclass(frozen=True)
class HeldOut:
    """What a fold holds out in one dataset and context."""

    dataset: str  # Their names
    context: str
    tested: tuple[str, ...]  # The labels that are predicted and scored
    truth: Path  # h5ad of the real cells of all ranked labels, and the control cells
    targets: Path  # The target list: the labels tested, with as many cells as there are real ones
    num_controls: int  # Control cells, and all cells of a prediction
    num_cells: int
    # Where the truth is of counts, the median total of its cells, to which the scorer normalises it; ``None``
    # where it is of log1p values
    target_sum: float | None = None

    @property
    def name(self) -> str:
        """The key of its scores."""
        return f"{self.dataset}.{self.context}"


def prepare_truth(
    store: Store, experiment: Experiment, folder: Path, *, rules: Season, ranked: Mapping[str, Sequence[str]]
) -> list[HeldOut]:
    """Write the truth of each dataset and context with held-out perturbations, unless it exists."""
    in_counts = experiment.generate.scale == "counts"
    found = []
    pairs = sorted({(screen.dataset, screen.context) for screen in store.screens})
    for code, (dataset, context) in enumerate(pairs):
        rows = store.rows(split=Split.TEST, dataset=dataset, context=context)
        tested = np.setdiff1d(np.unique(store.pert_codes[rows]), [store.control_code])
        if not len(tested):
            continue
        names = tuple(store.perts[pert] for pert in tested)
        of = store.datasets[dataset], store.contexts[context]
        labels = sorted({*names} | (set(ranked.get(".".join(of), ())) & set(store.perts)))
        cells = {label: _rows(store, dataset, context, label) for label in labels}
        controls = control_rows(store, experiment, *of)
        truth, targets = folder / f"truth-{code}.h5ad", folder / f"targets-{code}.csv"
        if not truth.is_file():
            groups = [*((label, rows) for label, rows in cells.items()), (rules.control_label, controls)]
            _write_cells(truth, store, groups, rules, in_counts=in_counts)
            _write_targets(targets, store, {name: cells[name] for name in names}, rules, with_depth=in_counts)
        total = len(controls) + sum(len(cells[name]) for name in names)
        of_all = np.concatenate([*cells.values(), controls])
        target_sum = float(np.median(store.totals[of_all])) if in_counts else None
        found.append(HeldOut(*of, names, truth, targets, len(controls), total, target_sum))
    if not found:
        raise DataError(f"{store.path}: no cell of a test perturbation is held out; name some in [fewshot] test")
    return found


def _rows(store: Store, dataset: int, context: int, label: str) -> NDArray[np.int64]:
    codes = {"dataset": dataset, "context": context, "pert": store.perts.index(label)}
    held = store.rows(split=Split.TEST, **codes)
    return held if len(held) else store.rows(split=Split.TRAIN | Split.VAL, **codes)


def _write_cells(
    path: Path, store: Store, groups: Iterable[tuple[str, NDArray[np.int64]]], rules: Season, *, in_counts: bool
) -> None:
    read = store.counts if in_counts else store.csr
    labels: list[str] = []
    with atomic_file(path) as temporary, CsrWriter(temporary, list(store.genes)) as writer:
        for label, rows in groups:
            for start in range(0, len(rows), _CELLS_AT_ONCE):
                writer.append(read(rows[start : start + _CELLS_AT_ONCE]))
            labels += [label] * len(rows)
        index = [str(number) for number in range(len(labels))]
        writer.finish(pd.DataFrame({rules.pert_column: pd.Categorical(labels)}, index=index))


def _write_targets(
    path: Path, store: Store, cells: Mapping[str, NDArray[np.int64]], rules: Season, *, with_depth: bool
) -> None:
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([rules.pert_column, "n_cells", *(["median_umi_per_cell"] if with_depth else [])])
        for name, rows in cells.items():
            writer.writerow([name, len(rows), *([float(np.median(store.totals[rows]))] if with_depth else [])])


def against_truth(predicted: PseudobulkStats, truth: PseudobulkStats) -> dict[str, dict[str, float]]:
    """Return the metrics of each predicted target, ranked among all targets of the truth."""
    scored = compare_sides(predicted, select_perts(truth, predicted.perts))
    position = {gene: number for number, gene in enumerate(truth.genes)}
    own_gene = np.array([position.get(pert, -1) for pert in predicted.perts], dtype=np.int64)
    own_row = np.array([truth.perts.index(pert) for pert in predicted.perts], dtype=np.int64)
    ranks = discrimination(truth.effects, predicted.effects, own_gene, own_row=own_row)
    sizes = np.abs(select_perts(truth, predicted.perts).effects).mean(axis=1)
    for row, pert in enumerate(predicted.perts):
        scored[pert] |= {"pds": float(ranks[row]), "effect_size": float(sizes[row])}
    return scored


def reference_scores(
    store: Store, held: Sequence[HeldOut], kept: Path, *, rules: Season, progress: Progress
) -> dict[str, Scores]:
    """Return the scores of the training-mean baseline and of one half of the real cells, cached in a file."""
    if kept.is_file():
        return read_json(kept)
    scores: dict[str, Scores] = {"baseline": {}, "ceiling": {}}
    for part in held:
        truth = read_side(part.truth, rules, cache=kept.parent, progress=progress)
        own = store.rows(split=Split.TRAIN, **_codes(store, part))
        own = own[store.pert_codes[own] != store.control_code]
        rows = store.rows(split=Split.TRAIN)
        rows = own if len(own) else rows[store.pert_codes[rows] != store.control_code]
        keys = store.screen_codes[rows].astype(np.int64) * len(store.perts) + store.pert_codes[rows]
        means = [_mean(store, rows[keys == key], part.target_sum) for key in np.unique(keys)]
        constant = np.mean(means, axis=0).astype(np.float32)
        controls = _log1p(
            store, store.rows(split=Split.TRAIN, pert=store.control_code, **_codes(store, part)), part.target_sum
        )
        side = constant_side(constant, controls, select_perts(truth, part.tested), progress=progress)
        scores["baseline"][part.name] = against_truth(side, truth)
        first, second = read_halves(part.truth, rules, progress=progress)
        tested = tuple(name for name in part.tested if name in first.perts)
        scores["ceiling"][part.name] = against_truth(select_perts(second, tested), first)
    write_json(kept, scores)
    return scores


def _codes(store: Store, held: HeldOut) -> dict[str, int]:
    return {"dataset": store.datasets.index(held.dataset), "context": store.contexts.index(held.context)}


def _mean(store: Store, rows: NDArray[np.int64], target_sum: float | None) -> NDArray[np.float64]:
    total = np.zeros(len(store.genes))
    for start in range(0, len(rows), _CELLS_AT_ONCE):
        block = _log1p(store, rows[start : start + _CELLS_AT_ONCE], target_sum)
        total += np.bincount(block.indices, weights=block.data, minlength=len(total))
    return total / len(rows)


def _log1p(store: Store, rows: NDArray[np.int64], target_sum: float | None) -> sparse.csr_matrix:
    """Return log1p values as the scorer computes them for the truth."""
    if target_sum is None:
        return store.csr(rows)
    return normalise_log1p(store.counts(rows), store.totals[rows], target_sum)
