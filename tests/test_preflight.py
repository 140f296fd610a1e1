"""Before training: everything that would stop an experiment later is said at once, before a value is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import pertcast.data.prepare
from conftest import write_small_h5ad
from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.errors import PertcastError
from pertcast.ladder.compare import candidates_of, compare
from pertcast.pipeline import run_experiment
from pertcast.preflight import preflight
from workspace import Workspace, make_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "w")


@pytest.fixture(autouse=True)
def no_values_are_read(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail where a store is begun; tests that make one ask for `values`."""
    if "values" not in request.fixturenames:
        monkeypatch.setattr(pertcast.data.prepare, "StoreWriter", None)


@pytest.fixture
def values() -> None:
    """Let a test make stores."""


def problems_of(workspace: Workspace, *overrides: str) -> str:
    with pytest.raises(PertcastError) as caught:
        run_experiment(workspace.experiment, workspace.out, overrides=["model.preset=tiny", *overrides])
    assert not workspace.out.exists()
    return str(caught.value)


def test_all_problems_are_said_at_once_and_nothing_is_written(workspace: Workspace) -> None:
    write_small_h5ad(workspace.data, scale="log1p")
    workspace.targets.write_text("target_gene,n_cells\nG1,30\nG77,41\nG3,45\n")
    said = problems_of(
        workspace,
        "submission.rules.num_genes=20",
        "submission.context=K563",
        "generate.cells=donors",
        "prepare.target_sum=500",
    )
    for part in (
        "no control cells of 'K563'; the data have 'H1'",
        "'G77': it has no feature",
        "cells = 'donors': they need control cells in counts",
        "expected values normalised to 500, got log1p values normalised to 10,000",
    ):
        assert part in said, said


def test_labels_split_and_genes_are_said_together(workspace: Workspace) -> None:
    workspace.genes.write_text("".join(f"G{number}\n" for number in range(1, 21)))
    said = problems_of(workspace, 'fewshot."small.H1".test=["G9"]')
    assert "no cell of small.H1 has the perturbation 'G9'" in said
    assert "lacks 1 of the 20 genes of the list: G20" in said


def test_a_list_is_checked_even_if_the_cells_cannot_be_read(workspace: Workspace) -> None:
    workspace.targets.write_text("target_gene,n_cells\nG1,thirty\n")
    said = problems_of(workspace, "columns.pert=guide")
    assert "expected n_cells as a whole number" in said
    assert "guide" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.heads=7",), "[model] heads: expected a divisor"),
        (("train.select_by=pds", "prepare.holdout_cells=0.0"), "[train] select_by"),
        (("loss.energy=0",), "every term is switched off"),
        (("submission.dataset=small", "submission.context=H2"), "no control cells of 'H2'"),
    ],
)
def test_what_cannot_be_trained_is_said_before(workspace: Workspace, overrides: tuple[str, ...], said: str) -> None:
    assert said in problems_of(workspace, *overrides)


def test_the_counts_head_wants_counts(workspace: Workspace) -> None:
    write_small_h5ad(workspace.data, scale="log1p")
    assert "[loss] nb: the counts head learns from whole counts" in problems_of(workspace, "loss.nb=1")


def test_a_context_is_checked_without_a_target_list(workspace: Workspace) -> None:
    workspace.experiment.write_text(workspace.experiment.read_text().replace('targets = "targets.csv"\n', ""))
    with pytest.raises(PertcastError, match="no control cells of 'rpe1'"):
        preflight(load_experiment(workspace.experiment, ["submission.context=rpe1"]))


def test_a_disk_without_room_is_said_before(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 1 << 20

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    assert "the store and the prediction needs about" in problems_of(workspace)


def test_features_of_every_candidate_are_checked_before_the_first_trains(workspace: Workspace) -> None:
    np.savez(workspace.folder / "features.npz", gene=np.array(["G1", "G2"]), embedding=np.eye(2, dtype=np.float32))
    candidates = candidates_of([workspace.experiment], rungs=[], models=["mean", "ridge"])
    text = workspace.experiment.read_text()
    workspace.experiment.write_text(f'{text}\n[features]\nkind = "file"\npath = "features.npz"\n')
    with pytest.raises(PertcastError, match="'G3': it has no feature"):
        compare(candidates, workspace.folder / "comparison", folds=3)


@pytest.mark.usefixtures("values")
def test_a_store_is_checked_as_the_files_are(workspace: Workspace) -> None:
    experiment = load_experiment(workspace.experiment)
    store = Store.open(prepare(experiment, workspace.out / "store"))
    preflight(experiment, store=store)
    other = load_experiment(workspace.experiment, ["submission.context=K563", "submission.rules.num_genes=30"])
    with pytest.raises(PertcastError) as caught:
        preflight(other, store=store)
    assert "K563" in str(caught.value)
    assert "wants 30 genes, got 20" in str(caught.value)


STARTER = """
[datasets]
others = "data/{jurkat,rpe1,hepg2}.h5"
h1 = "data/h1.h5"

[training]
others = "train"
h1 = "train"

[zeroshot]
"others.hepg2" = "test"

[fewshot."h1.H1"]
val = ["G2"]

[columns]
cell_type = "cell_type"
batch = "batch"

[prepare]
num_hvgs = 10

[model]
preset = "tiny"
set_size = 8
hidden = 16
feedforward = 32
heads = 2
batch_embedding = true

[loss]
mae = 1.0
de = 0.5
rank = 0.5

[train]
steps = 4
sets_per_step = 2
precision = "fp32"

[submission]
genes = "genes.csv"
targets = "targets.csv"
context = "H1"

[submission.rules]
num_genes = 20
num_targets = 3
max_cells = 120
"""


@pytest.mark.usefixtures("values")
def test_a_starter_of_several_files_and_lines_reaches_the_end(workspace: Workspace) -> None:
    for number, line in enumerate(("jurkat", "rpe1", "hepg2", "H1")):
        contexts = (line,)
        write_small_h5ad(workspace.data.with_name(f"{line.lower()}.h5"), contexts=contexts, seed=number)
    workspace.experiment.write_text(STARTER)
    outcome = run_experiment(workspace.experiment, workspace.out)
    assert outcome.report.ok
    store = Store.open(outcome.store)
    assert [store.screen_name(code) for code in range(4)] == ["others.hepg2", "others.jurkat", "others.rpe1", "h1.H1"]
