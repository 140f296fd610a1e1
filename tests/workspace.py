"""A small whole experiment on disk: 20 genes, three targets, a network of a few hundred weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import PRECISION, SMALL_GENES, write_small_h5ad
from pertcast.config import load_experiment
from pertcast.data.prepare import prepare

EXPERIMENT = f"""
[datasets]
small = "data"

[training]
small = "train"

[columns]
cell_type = "cell_type"
batch = "batch"

[prepare]
holdout_cells = 0.2
num_hvgs = 10

[model]
preset = "tiny"
set_size = 8
hidden = 16
feedforward = 32
heads = 2

[train]
steps = 12
sets_per_step = 2
learning_rate = 1e-3
precision = "{PRECISION}"
match = "context"
val_every = 4
checkpoint_every = 3

[generate]
cells = "model"

[submission]
genes = "genes.csv"
targets = "targets.csv"

[submission.rules]
num_genes = 20
num_targets = 3
max_cells = 120
"""
TARGETS = "target_gene,n_cells,median_umi_per_cell\nG1,30,500\nG2,41,500\nG3,45,500\n"


@dataclass(frozen=True)
class Workspace:
    """Paths of one experiment; `out` is where `pertcast run` puts everything."""

    folder: Path

    @property
    def experiment(self) -> Path:
        return self.folder / "experiment.toml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def data(self) -> Path:
        return self.folder / "data" / "small.h5ad"

    @property
    def genes(self) -> Path:
        return self.folder / "genes.csv"

    @property
    def targets(self) -> Path:
        return self.folder / "targets.csv"


def make_workspace(folder: Path) -> Workspace:
    """Write the inputs of a small experiment."""
    workspace = Workspace(folder)
    workspace.data.parent.mkdir(parents=True)
    write_small_h5ad(workspace.data)
    workspace.experiment.write_text(EXPERIMENT)
    workspace.genes.write_text("".join(f"{gene}\n" for gene in SMALL_GENES))
    workspace.targets.write_text(TARGETS)
    return workspace


def prepared_workspace(folder: Path) -> Workspace:
    """Write the same, and its store."""
    workspace = make_workspace(folder)
    prepare(load_experiment(workspace.experiment), workspace.folder / "store")
    return workspace


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(run: Path, other: Path, *, rtol: float = 1e-4) -> None:
    """Compare two runs step by step."""
    ours, theirs = metrics(run), metrics(other)
    assert [(entry["kind"], entry["step"]) for entry in ours] == [(entry["kind"], entry["step"]) for entry in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"kind"}:
            assert one[name] == pytest.approx(two[name], rel=rtol, abs=1e-6), (one["step"], name)
