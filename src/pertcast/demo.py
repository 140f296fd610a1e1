"""The demo: the whole pipeline on the real cells in the package, compared with held-out cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import anndata as ad
import numpy as np
from numpy.typing import NDArray

from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.ladder.report import write_report
from pertcast.pipeline import Outcome, run_experiment
from pertcast.progress import SILENT, Progress
from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN
from pertcast.stats.metrics import compare_effects, knockdown
from pertcast.submission.pack import unpack

HEADER = (
    "target",
    "cells",
    "own gene left\nheld out",
    "\npredicted",
    "effect size\nheld out",
    "\npredicted",
    "corre-\nlation",
)


@dataclass(frozen=True)
class TargetRow:
    """One target: its predicted cells beside cells that training has not seen."""

    target: str
    num_cells: int
    own_held_out: float
    own_predicted: float
    size_held_out: float
    size_predicted: float
    correlation: float

    def cells(self) -> list[str]:
        """Return the row as text."""
        own = ["–" if np.isnan(value) else f"{value:.0%}" for value in (self.own_held_out, self.own_predicted)]
        rest = [f"{self.size_held_out:.2f}", f"{self.size_predicted:.2f}", f"{self.correlation:.2f}"]
        return [self.target, f"{self.num_cells:,}", *own, *rest]


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo made, its table and report; `identical`: unpacking returned the packed prediction."""

    outcome: Outcome
    rows: tuple[TargetRow, ...]
    unpacked: Path
    identical: bool
    report: Path


def run_demo(out: Path, *, overrides: Sequence[str] = (), progress: Progress = SILENT) -> DemoOutcome:
    """Train, generate, assemble, check, pack and unpack on the shipped H1 cells, and write the report."""
    with as_file(files("pertcast") / "assets") as assets:
        outcome = run_experiment(assets / "demo.toml", out, overrides=overrides, progress=progress)
    unpacked = unpack(outcome.archive, out / "unpacked.h5ad")
    report = write_report(out, ladder=out, progress=progress)
    prediction = ad.read_h5ad(unpacked)
    rows = tuple(_rows(Store.open(outcome.store), prediction))
    return DemoOutcome(outcome, rows, unpacked, identical=_same(prediction, outcome.prediction), report=report)


def _same(unpacked: ad.AnnData, path: Path) -> bool:
    packed = ad.read_h5ad(path)
    return (
        unpacked.shape == packed.shape
        and (unpacked.X != packed.X).nnz == 0
        and list(unpacked.var_names) == list(packed.var_names)
        and list(unpacked.obs[PERT_COLUMN]) == list(packed.obs[PERT_COLUMN])
    )


def _rows(store: Store, prediction: ad.AnnData) -> list[TargetRow]:
    labels = prediction.obs[PERT_COLUMN].to_numpy()
    genes = list(store.genes)
    held_control = _held_out_mean(store, store.control)
    predicted_control = _mean(prediction, labels == CONTROL_LABEL)
    rows = []
    for target in dict.fromkeys(label for label in labels if label != CONTROL_LABEL):
        held, predicted = _held_out_mean(store, target), _mean(prediction, labels == target)
        agreement = compare_effects(predicted - predicted_control, held - held_control)
        own = genes.index(target) if target in genes else None
        left = (
            (knockdown(held[own], held_control[own]), knockdown(predicted[own], predicted_control[own]))
            if own is not None
            else (float("nan"), float("nan"))
        )
        sizes = agreement.measured_size, agreement.predicted_size
        rows.append(TargetRow(target, int((labels == target).sum()), *left, *sizes, agreement.correlation))
    return rows


def _mean(prediction: ad.AnnData, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray(prediction.X[mask].mean(axis=0), dtype=np.float64).ravel()


def _held_out_mean(store: Store, label: str) -> NDArray[np.float64]:
    """Return mean log1p of the cells of a label that training has not seen."""
    rows = store.rows(split=Split.VAL, pert=store.perts.index(label))
    return store.log1p(rows).mean(axis=0, dtype=np.float64)
