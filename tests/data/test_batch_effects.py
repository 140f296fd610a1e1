"""Batches: how much they explain, sets of no known batch in training, and what a new batch gets."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import write_small_h5ad
from pertcast.config import load_experiment
from pertcast.data.counts_fit import batch_effects
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.models.run_folder import open_run
from pertcast.stats.realism import explained_share
from pertcast.train import train
from pertcast.train.batches import Batch, forget_batches
from training_bench import EXPERIMENT, Watcher


def omega_squared(values: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """The textbook's formula, cell by cell."""
    total = between = within = freedom_between = freedom_within = 0.0
    for group in set(groups.tolist()):
        some = [(value, label) for value, label, own in zip(values, labels, groups, strict=True) if own == group]
        names = {label for _, label in some}
        if len(names) < 2:
            continue
        grand = sum(value for value, _ in some) / len(some)
        for value, label in some:
            mean = sum(v for v, other in some if other == label) / sum(other == label for _, other in some)
            total += float(np.sum((value - grand) ** 2))
            between += float(np.sum((mean - grand) ** 2))
            within += float(np.sum((value - mean) ** 2))
        freedom_between += len(names) - 1
        freedom_within += len(some) - len(names)
    mean_square = within / freedom_within
    return (between - freedom_between * mean_square) / (total + mean_square)


def test_the_explained_share_is_omega_squared() -> None:
    random = np.random.default_rng(0)
    values, labels, groups = random.normal(size=(60, 3)), random.integers(0, 4, 60), random.integers(0, 3, 60)
    values += labels[:, None] * 0.5 + groups[:, None] * 10
    groups[:2], labels[:2] = 7, 1  # a group with one label says nothing
    assert explained_share(values, labels, groups) == pytest.approx(omega_squared(values, labels, groups), rel=1e-12)


def test_a_label_that_means_nothing_explains_nothing_however_many_there_are() -> None:
    random = np.random.default_rng(1)
    shares = [
        explained_share(random.normal(size=(200, 5)), random.integers(0, 60, 200), np.zeros(200, dtype=int))
        for _ in range(40)
    ]
    assert abs(np.mean(shares)) < 0.01
    assert np.isnan(explained_share(random.normal(size=(3, 2)), np.arange(3), np.zeros(3, dtype=int)))


def write_batches(path: Path, *, spread: float, batches: tuple[str, ...] = ("b1", "b2", "b3")) -> None:
    """Write cells whose batches differ, in the same way in perturbed and control cells."""
    cells = ad.read_h5ad(write_small_h5ad(path, batches=batches, cells_per_group=20))
    random = np.random.default_rng(5)
    factors = {batch: np.exp(spread * random.normal(size=cells.n_vars)) for batch in batches}
    rates = cells.X.toarray() * np.stack([factors[batch] for batch in cells.obs["batch"]])
    cells.X = random.poisson(rates).astype(np.float32)
    cells.write_h5ad(path)


def make_run(folder: Path, name: str, *overrides: str, watcher: Watcher | None = None) -> Path:
    (folder / "experiment.toml").write_text(EXPERIMENT)
    experiment = load_experiment(folder / "experiment.toml", ["prepare.holdout_cells=0.0", *overrides])
    store = prepare(experiment, folder / "store")
    return train(experiment, store, folder / name, progress=watcher or Watcher())


def test_matching_by_batch_takes_the_batch_s_variance_away_and_the_run_says_so(tmp_path: Path) -> None:
    write_batches(tmp_path / "small.h5ad", spread=0.5)
    watcher = Watcher()
    run = open_run(make_run(tmp_path, "run", "train.steps=2", watcher=watcher))
    found = run.metrics["batch_effects"]
    assert found["before"] > 0.1
    assert abs(found["after"]) < 0.02
    assert found["num_cells"] == 3 * 60
    assert any("batch explains" in note and f"{found['before']:.1%}" in note for note in watcher.notes)
    assert any("batch explains" in note for note in run.notes)


def test_where_batches_are_alike_or_one_there_is_nothing_to_report(tmp_path: Path) -> None:
    write_batches(tmp_path / "small.h5ad", spread=0.0)
    make_run(tmp_path, "run", "train.steps=1")
    effects = batch_effects(Store.open(tmp_path / "store"))
    assert effects is not None
    assert max(abs(effects.before), abs(effects.after)) < 0.03
    write_batches(tmp_path / "small.h5ad", spread=0.5, batches=("only",))
    (tmp_path / "again").mkdir()
    make_run(tmp_path, "again/run", "train.steps=1")
    assert batch_effects(Store.open(tmp_path / "store")) is None


def test_forgotten_sets_are_of_no_known_batch_and_others_stay() -> None:
    nothing = torch.zeros(3, 1)
    batch = Batch(nothing, nothing, torch.arange(6).reshape(3, 2), nothing, nothing, None, nothing)
    assert forget_batches(batch, torch.tensor([False, True, False])).batch_BS.tolist() == [[0, 1], [-1, -1], [4, 5]]


def test_the_row_of_the_unknown_batch_learns_where_sets_are_shown_without_theirs(tmp_path: Path) -> None:
    write_batches(tmp_path / "small.h5ad", spread=0.3)
    embeds = "model.batch_embedding=true"
    learnt = load_file(make_run(tmp_path, "run", embeds, "train.batch_dropout=0.5") / "weights.safetensors")
    never = load_file(make_run(tmp_path, "never", embeds, "train.batch_dropout=0.0") / "weights.safetensors")
    assert learnt["batch_encoder.weight"][-1].any()
    assert not never["batch_encoder.weight"][-1].any()


def test_a_batch_without_training_cells_gets_the_row_of_the_unknown_one(tmp_path: Path) -> None:
    write_batches(tmp_path / "small.h5ad", spread=0.3)
    cells = ad.read_h5ad(tmp_path / "small.h5ad")
    held = (cells.obs["target_gene"] == "G3") | (cells.obs["batch"] != "b3")
    cells[held.to_numpy()].copy().write_h5ad(tmp_path / "small.h5ad")  # b3 has cells of G3 alone
    overrides = [
        "model.batch_embedding=true",
        "train.match='context'",
        "features.missing='mean'",
        "fewshot.\"small.H1\".val=['G3']",
    ]
    run = open_run(make_run(tmp_path, "run", *overrides))
    rows = load_file(run.path / "weights.safetensors")["batch_encoder.weight"]
    assert torch.equal(rows[run.batches.index("b3")], rows[-1])
    assert not torch.equal(rows[run.batches.index("b1")], rows[-1])
    assert any("get the row of the unknown batch" in note for note in run.notes)
