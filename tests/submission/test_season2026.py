"""Season 2026 at a small size: lines that only control cells are given of, counts, no controls in the file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from conftest import SMALL_GENES, write_small_h5ad
from pertcast.config import load_experiment
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError, DataError, SubmissionError
from pertcast.generate import generate
from pertcast.ladder.score import score
from pertcast.pipeline import Outcome, run_experiment
from pertcast.seasons import season
from pertcast.submission.official_packer import find_packer

RECIPE = Path(__file__).parents[2] / "recipes" / "vcc2026.toml"
SMALL = (
    "prepare.num_hvgs=10",
    "features.kind=onehot",
    "features.path=none",
    "features.missing=mean",
    "model.preset=tiny",
    "model.set_size=8",
    "model.hidden=16",
    "model.feedforward=32",
    "model.heads=2",
    "train.steps=6",
    "train.val_every=3",
    "train.checkpoint_every=3",
    "submission.rules.num_genes=20",
    "submission.rules.num_targets=4",
    "submission.rules.cells_per_target=12",
    "submission.rules.max_cells=200",
)


def write_inputs(folder: Path, *, contexts: tuple[str, ...] = ("A", "B", "C", "D"), manifest: str = "A,B,C") -> Path:
    """Write a training file of two lines, controls of four contexts, and the bundle's lists; return the experiment."""
    bundle = folder / "data" / "controls"
    bundle.mkdir(parents=True)
    write_small_h5ad(folder / "data" / "training.h5ad", contexts=("K562", "H1"))
    for seed, context in enumerate(contexts):
        path = write_small_h5ad(
            bundle / f"{context}.h5ad", perts=("NTC",), contexts=(context,), cells_per_group=20, seed=seed + 1
        )
        cells = ad.read_h5ad(path)
        cells.obs = cells.obs.rename(columns={"cell_type": "context", "target_gene": "guide"}).drop(columns="batch")
        cells.write_h5ad(path)
    (bundle / "gene_names.csv").write_text("".join(f"{gene}\n" for gene in ("gene_name", *SMALL_GENES)))
    (bundle / "pert_counts.csv").write_text("target_gene\nG1\nG2\nG3\nG4\n")
    (bundle / "manifest.json").write_text(json.dumps({"contexts": manifest.split(","), "panel_id": "validation"}))
    text = RECIPE.read_text()
    own = '[columns.of.controls]\npert = "guide"\ncontrol = "NTC"\n'
    text = text.replace("[columns.of.controls]                       # what the season's files call otherwise\n", own)
    text = text.replace('path = "data/features.pt"', "# path").replace('kind = "file"', 'kind = "onehot"')
    experiment = folder / "vcc2026.toml"
    experiment.write_text(text)
    return experiment


OVERRIDES = [item for item in SMALL if not item.startswith("features.kind") and not item.startswith("features.path")]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("season"))


@pytest.fixture(scope="module")
def outcome(experiment: Path) -> Outcome:
    return run_experiment(experiment, experiment.parent / "out", overrides=OVERRIDES)


def test_contexts_that_only_have_controls_are_predicted_in_counts(outcome: Outcome) -> None:
    assert outcome.report.ok
    cells = ad.read_h5ad(outcome.prediction)
    assert cells.obs.groupby(["context", "target_gene"], observed=True).size().to_dict() == {
        (context, f"G{number}"): 12 for context in "ABC" for number in (1, 2, 3, 4)
    }
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert outcome.archive.is_file()
    assert any(
        "contexts A, B, C, as" in note for note in json.loads((outcome.parts / "plan.json").read_text())["notes"]
    )


def test_each_context_is_made_of_its_own_control_cells(outcome: Outcome) -> None:
    store = Store.open(outcome.store)
    assert store.contexts == ("A", "B", "C", "D", "H1", "K562")
    assert store.control == "non-targeting"
    cells = ad.read_h5ad(outcome.prediction)
    every = Split.TRAIN | Split.VAL | Split.TEST
    for context in "ABC":
        made = cells[cells.obs["context"] == context].X.toarray()
        rows = store.rows(split=every, context=store.contexts.index(context), pert=store.control_code)
        assert len(rows) == 40
        # a network of six steps predicts next to nothing, but the depth is that of the context's own cells
        assert abs(np.median(made.sum(axis=1)) / np.median(store.totals[rows]) - 1) < 0.4


@pytest.mark.filterwarnings("ignore")
def test_a_prediction_without_controls_is_scored_beside_the_truths_controls(outcome: Outcome, tmp_path: Path) -> None:
    pytest.importorskip("cell_eval2")
    predicted = ad.read_h5ad(outcome.prediction)
    assert "non-targeting" not in set(predicted.obs["target_gene"])
    real = predicted.copy()
    controls = predicted[:60].copy()
    controls.X = np.random.default_rng(0).poisson(5.0, controls.shape).astype(np.float32)
    controls.obs["target_gene"] = "non-targeting"
    controls.obs["context"] = ["A", "B", "C"] * 20
    joined = ad.concat([real, controls], index_unique="-")
    joined.write_h5ad(tmp_path / "real.h5ad")
    found = score(outcome.prediction, tmp_path / "real.h5ad", season="vcc2026")
    assert set(found.targets) == {f"{context}/G{number}" for context in "ABC" for number in (1, 2, 3, 4)}
    joined.write_h5ad(tmp_path / "with_controls.h5ad")
    assert score(tmp_path / "with_controls.h5ad", tmp_path / "real.h5ad", season="vcc2026").overall == pytest.approx(
        found.overall, nan_ok=True
    )


def test_the_bundle_says_which_contexts_are_due(experiment: Path, outcome: Outcome, tmp_path: Path) -> None:
    manifest = experiment.parent / "data" / "controls" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text('{"contexts": ["D", "E", "F"]}')
    try:
        with pytest.raises(DataError, match=r"contexts D, E, F; there are 'A'.*columns.of"):
            generate(outcome.run, tmp_path / "parts")
    finally:
        manifest.write_text(before)


def test_columns_of_a_dataset_are_told_apart_from_the_others(experiment: Path) -> None:
    found = load_experiment(experiment, OVERRIDES).columns
    assert found.in_dataset("training").cell_type == "cell_type"
    own = found.in_dataset("controls")
    assert (own.pert, own.control, own.cell_type, own.batch) == ("guide", "NTC", "context", None)
    text = experiment.read_text()
    wrong = experiment.with_name("wrong.toml")
    wrong.write_text(text.replace("[columns.of.controls]", "[columns.of.other]"))
    with pytest.raises(ConfigError, match=r"columns.of.other.*no such dataset"):
        load_experiment(wrong, OVERRIDES)


def test_the_official_packer_accepts_the_prediction(experiment: Path, outcome: Outcome) -> None:
    rules = season("vcc2026", {"num_genes": 20, "num_targets": 4, "cells_per_target": 12, "max_cells": 200})
    try:
        program = find_packer(rules)
    except SubmissionError as error:
        pytest.skip(str(error))
    bundle = experiment.parent / "data" / "controls"
    command = [str(program), "prep", "-i", str(outcome.prediction), "-g", str(bundle / "gene_names.csv"), "--dry-run"]
    command += ["--perts", str(bundle / "pert_counts.csv"), "--expected-gene-dim", "20", "--cells-per-pert", "12"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr or ran.stdout
