"""Nothing of a held-out target reaches the weights, whatever its cells are like and whatever reads the training cells.

The planted cells would move the highly variable genes, means, normalisation, DE labels, features, the truth of the
losses and the baselines: a first test shows that they do where they train, so that the others can fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from conftest import SMALL_GENES, write_small_h5ad
from pertcast.config import Experiment
from pertcast.data.de_labels import de_labels
from pertcast.data.features import load_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.progress import SILENT
from pertcast.train import train
from pertcast.train.training_effects import training_effects

TARGET = "G2"
PERTS = ("non-targeting", "G1", "G2", "G3", "G4", "G5")
ALL_TERMS = {"energy": 1.0, "mae": 1.0, "de": 0.5, "rank": 0.5, "warmup_steps": 2, "rank_negatives": 2}
NETWORK = {"preset": "tiny", "set_size": 8, "hidden": 16, "feedforward": 32, "heads": 2}
MODELS: dict[str, dict[str, object]] = {
    "hvg in, genes out": {"input": "hvg"},
    "shift": {"residual": "shift"},
    "shift on ridge": {"residual": "shift", "base": "ridge"},
    "embeddings of batch and context": {"batch_embedding": True, "context_embedding": True},
    "mean": {"kind": "mean"},
    "ridge": {"kind": "ridge"},
    "kernel ridge": {"kind": "kernel_ridge"},
    "knn": {"kind": "knn"},
}


def plant(folder: Path, *, garbage: bool) -> Path:
    """Write cells; with garbage, those of the target are loud in half of the genes, silent in the others, and noisy."""
    folder.mkdir(parents=True)
    path = write_small_h5ad(folder / "cells.h5ad", perts=PERTS)
    if garbage:
        cells = ad.read_h5ad(path)
        counts = cells.X.toarray()
        mine = (cells.obs["target_gene"] == TARGET).to_numpy()
        noise = np.random.default_rng(5).poisson(400, size=(mine.sum(), len(SMALL_GENES)))
        counts[mine] = (
            noise * (np.arange(len(SMALL_GENES)) % 2) * np.random.default_rng(6).integers(0, 9, size=(mine.sum(), 1))
        )
        cells.X = sparse.csr_matrix(counts.astype(np.float32))
        cells.write_h5ad(path)
    return path


def experiment_of(
    path: Path, *, held: str | None = "test", features: str = "coexpression", model: Mapping[str, object] | None = None
) -> Experiment:
    fewshot = {"d.H1": {"val": ["G3"], "test": [TARGET]} if held == "test" else {"val": ["G3", TARGET]}}
    table = path.parent / "features.npz"
    names = [name for name in PERTS if name != "non-targeting"]
    np.savez(table, gene=names, embedding=np.random.default_rng(0).normal(size=(len(names), 4)))
    by_kind = {
        "coexpression": {"kind": "coexpression", "num_loadings": 3},
        "onehot": {"kind": "onehot", "missing": "mean"},
        "nearest": {"kind": "onehot", "missing": "nearest"},
        "labels": {"kind": "labels", "missing": "mean"},
        "file": {"kind": "file", "path": str(table)},
    }
    given = {
        "datasets": {"d": str(path)},
        "training": {"d": "train"},
        "columns": {"cell_type": "cell_type", "batch": "batch"},
        "prepare": {"num_hvgs": 8, "holdout_cells": 0.1},
        "fewshot": fewshot if held else {},
        "features": by_kind[features],
        "model": {**NETWORK, **(model or {})},
        "loss": ALL_TERMS,
        "train": {
            "steps": 5,
            "precision": "fp32",
            "sets_per_step": 4,
            "val_every": 5,
            "checkpoint_every": 50,
            "learning_rate": 1e-3,
        },
    }
    return Experiment.model_validate(given, strict=False)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    # folders apart, not file names: the draw of validation cells knows the file's name
    folder = tmp_path_factory.mktemp("leakage")
    return plant(folder / "plain", garbage=False), plant(folder / "garbage", garbage=True)


def stores_of(paths: tuple[Path, Path], folder: Path, held: str | None = "test") -> tuple[Store, Store]:
    first, second = (
        Store.open(prepare(experiment_of(path, held=held), folder / name))
        for path, name in zip(paths, ("plain", "garbage"), strict=True)
    )
    return first, second


def learnt(store: Store, experiment: Experiment) -> dict[str, np.ndarray]:
    """Return everything that the stages learn of the training cells before a network sees them."""
    effects = training_effects(store, np.arange(len(store.genes)), progress=SILENT)
    labels = de_labels(store)
    features = load_features(experiment.features, store, targets=PERTS[1:])
    return {
        "highly variable genes": store.hvg,
        "control mean": store.control_mean_log1p,
        "target sum": np.array(store.target_sum),
        "effects": effects.effects_NG,
        "DE labels": labels.significant,
        "features": features.matrix,
        "values of training cells": store.log1p(store.rows(split=Split.TRAIN)),
    }


def test_the_planted_cells_move_everything_where_they_train(paths: tuple[Path, Path], tmp_path: Path) -> None:
    plain, garbage = stores_of(paths, tmp_path, held=None)
    before, after = (learnt(store, experiment_of(paths[0])) for store in (plain, garbage))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    # control cells alone make the features, and their values move with the normalisation
    assert moved == set(before)


@pytest.mark.parametrize("features", ["coexpression", "onehot", "nearest", "labels", "file"])
@pytest.mark.parametrize("held", ["test", "val"])
def test_held_out_cells_move_nothing_that_is_learnt_of_training_cells(
    paths: tuple[Path, Path], tmp_path: Path, features: str, held: str
) -> None:
    plain, garbage = stores_of(paths, tmp_path, held)
    before, after = (
        learnt(store, experiment_of(path, held=held, features=features))
        for store, path in zip((plain, garbage), paths, strict=True)
    )
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)
    held_out = plain.rows(split=Split.TEST if held == "test" else Split.VAL, pert=plain.perts.index(TARGET))
    assert len(held_out)
    assert not np.array_equal(plain.log1p(held_out), garbage.log1p(held_out))


@pytest.mark.parametrize("model", MODELS)
def test_garbage_in_a_held_out_target_leaves_the_weights_as_they_are_to_the_bit(
    paths: tuple[Path, Path], tmp_path: Path, model: str
) -> None:
    stores = stores_of(paths, tmp_path)
    weights = []
    for store, path in zip(stores, paths, strict=True):
        experiment = experiment_of(path, model=MODELS[model])
        run = train(experiment, store.path, tmp_path / f"run-{store.path.name}")
        files = [file for file in sorted(run.iterdir()) if file.suffix == ".safetensors"]
        features = run / "features" / "features.safetensors"
        weights.append({file.name: file.read_bytes() for file in (*files, *([features] if features.is_file() else []))})
    assert weights[0]
    assert weights[0] == weights[1]


def test_the_same_garbage_in_training_changes_the_weights(paths: tuple[Path, Path], tmp_path: Path) -> None:
    weights = []
    for store, path in zip(stores_of(paths, tmp_path, held=None), paths, strict=True):
        experiment = experiment_of(path, held=None, model={"residual": "shift"})
        run = train(experiment, store.path, tmp_path / f"run-{store.path.name}")
        weights.append((run / "weights.safetensors").read_bytes())
    assert weights[0] != weights[1]
