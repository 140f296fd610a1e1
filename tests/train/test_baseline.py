"""Baselines as runs, and networks on a baseline: the whole path, leakage, resumption, refusals."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pertcast.cli.app import main
from pertcast.config import load_experiment
from pertcast.data.features import open_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError, DataError
from pertcast.files.artefacts import hash_file, verify_artefact
from pertcast.generate.predict import make_predictor
from pertcast.models.baselines import BaselineSpec, open_baseline, predict_effects
from pertcast.models.run_folder import open_run
from pertcast.models.state import StateTransition
from pertcast.pipeline import run_experiment
from pertcast.progress import SILENT
from pertcast.train import train
from pertcast.train.baseline import fit_base
from pertcast.train.batches import SetReader
from workspace import Workspace, make_workspace

KINDS = ("control", "mean", "ridge", "kernel_ridge", "knn")
ON_BASE = ("model.residual=shift", "model.base=ridge")
HELD_OUT = 'fewshot."small.H1".test=["G3"]'


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "w")


def features_of(folder: Path, names: tuple[str, ...] = ("G1", "G2", "G3"), *, seed: int = 0) -> list[str]:
    """Write a features file, and return the overrides that name it."""
    vectors = np.random.default_rng(seed).normal(size=(len(names), 4)).astype(np.float32)
    np.savez(folder / "f.npz", gene=np.array(names), embedding=vectors)
    return ["features.kind=file", f"features.path={str(folder / 'f.npz')!r}"]


def effects_of(store: Store) -> dict[str, np.ndarray]:
    """Return the training effects, one perturbation after the other."""
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code)).astype(np.float64).mean(0)
    rows = {name: store.rows(split=Split.TRAIN, pert=code) for code, name in enumerate(store.perts)}
    return {
        name: store.log1p(own).astype(np.float64).mean(0) - controls
        for name, own in rows.items()
        if len(own) and name != store.control
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_path_of_a_baseline_ends_in_a_valid_archive(workspace: Workspace, kind: str) -> None:
    overrides = [f"model.kind={kind}", *features_of(workspace.folder), HELD_OUT]
    outcome = run_experiment(workspace.experiment, workspace.out, overrides=overrides)
    assert outcome.report.ok
    for artefact in (outcome.run, outcome.parts, outcome.prediction, outcome.archive):
        assert verify_artefact(artefact) == []
    run, store = open_run(outcome.run), Store.open(outcome.store)
    assert isinstance(run.spec, BaselineSpec)
    assert (run.spec.kind, run.spec.set_size) == (kind, 8)
    assert set(load_file(outcome.run / "weights.safetensors")) == set(run.spec.shapes())
    baseline, effects = run.baseline(), effects_of(store)
    assert baseline is not None
    assert set(effects) == {"G1", "G2"}
    mean = (effects["G1"] + effects["G2"]) / 2
    found = predict_effects(baseline, open_features(outcome.run / "features").of(["G3"]), context=0)[0]
    if kind in ("control", "mean"):
        np.testing.assert_allclose(found, mean if kind == "mean" else 0 * mean, atol=1e-5)
    cells = ad.read_h5ad(outcome.parts / "H1" / "G3.h5ad").X.toarray()
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code))
    distance = np.abs(cells[:, None] - np.maximum(controls + found, 0)[None]).max(axis=-1)
    assert distance.min(axis=1).max() < 1e-5


def test_the_command_takes_the_model_by_name_and_leaves_a_fitted_one(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(workspace.experiment), "--out", str(workspace.out / "run"), "--model", "mean"]
    for words in ("mean baseline of 3 training effects", "already fitted"):
        with pytest.raises(SystemExit, match="0"):
            main(command)
        assert words in "".join(capsys.readouterr())
    with pytest.raises(SystemExit, match="1"):
        main([*command[:-1], "ridge"])
    assert "different settings" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["verify", str(workspace.out / "run")])


def test_controls_can_be_predicted_and_are_unchanged(workspace: Workspace) -> None:
    overrides = ["model.kind=mean", "submission.controls=predicted", "submission.num_controls=20"]
    outcome = run_experiment(workspace.experiment, workspace.out, overrides=overrides)
    store = Store.open(outcome.store)
    cells = ad.read_h5ad(outcome.parts / "H1" / "non-targeting.h5ad").X.toarray()
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code))
    assert (np.abs(cells[:, None] - controls[None]).max(axis=-1).min(axis=1) == 0).all()


def test_the_mean_effect_needs_no_features_and_ridge_does(workspace: Workspace) -> None:
    outcome = run_experiment(workspace.experiment, workspace.out, overrides=["model.kind=mean", HELD_OUT])
    assert outcome.report.ok
    assert open_features(outcome.run / "features").kind == "none"
    with pytest.raises(DataError, match=r"'G3': it has no feature"):
        run_experiment(workspace.experiment, workspace.folder / "other", overrides=["model.kind=ridge", HELD_OUT])


def test_only_highly_variable_genes_are_fitted_where_these_are_the_output(workspace: Workspace) -> None:
    overrides = ["model.kind=mean", "model.output=hvg", "generate.unpredicted_genes=control"]
    outcome = run_experiment(workspace.experiment, workspace.out, overrides=overrides)
    assert outcome.report.ok
    run = open_run(outcome.run)
    assert isinstance(run.spec, BaselineSpec)
    assert run.spec.num_genes == 10 == len(run.output_genes)


@pytest.mark.parametrize("overrides", [*([f"model.kind={kind}"] for kind in KINDS), [*ON_BASE, "train.steps=3"]])
def test_cells_that_are_held_out_move_nothing(workspace: Workspace, overrides: list[str]) -> None:
    given = [*overrides, *features_of(workspace.folder), HELD_OUT]
    hashes = []
    for turn in range(2):
        if turn:
            cells = ad.read_h5ad(workspace.data)
            held_out = (cells.obs["target_gene"] == "G3").to_numpy()
            values = cells.X.toarray()
            values[held_out] = np.random.default_rng(0).poisson(500, size=(held_out.sum(), 20))
            cells.X = values
            cells.write_h5ad(workspace.data)
        experiment = load_experiment(workspace.experiment, given)
        store = prepare(experiment, workspace.folder / f"store{turn}")
        run = train(experiment, store, workspace.folder / f"run{turn}")
        hashes.append(
            [hash_file(path) for path in sorted(run.rglob("*.safetensors")) if "checkpoints" not in str(path)]
        )
    assert hashes[0] == hashes[1]
    assert hashes[0]


def reader_of(workspace: Workspace, *overrides: str) -> tuple[SetReader, Store]:
    experiment = load_experiment(workspace.experiment, [*overrides, *features_of(workspace.folder)])
    store = Store.open(prepare(experiment, workspace.folder / "store"))
    from pertcast.data.features import load_features

    features = load_features(experiment.features, store)
    reader = SetReader(store, experiment, features)
    reader.base = fit_base("mean", store, features, output_genes=reader.output_genes, set_size=8, progress=SILENT)
    return reader, store


def test_in_training_the_base_of_a_perturbation_is_fitted_without_it(workspace: Workspace) -> None:
    reader, store = reader_of(workspace, *ON_BASE)
    effects = effects_of(store)
    sets = reader.training(0)
    base_BG = reader.read(sets).base_BG
    assert base_BG is not None
    for pert, base in zip(sets.pert, base_BG.numpy(), strict=True):
        name = store.perts[pert]
        others = [effect for other, effect in effects.items() if other != name]
        expected = np.zeros(20) if name == store.control else np.mean(others, axis=0)
        np.testing.assert_allclose(base, expected, atol=1e-5)


def test_the_base_of_a_perturbation_that_validates_is_the_whole_fit(workspace: Workspace) -> None:
    reader, store = reader_of(workspace, *ON_BASE, HELD_OUT.replace("test", "val"))
    sets = reader.validation()
    held_out = sets.pert == store.perts.index("G3")
    assert held_out.any()
    base_BG = reader.read(sets).base_BG
    assert base_BG is not None
    effects = effects_of(store)
    expected = (effects["G1"] + effects["G2"]) / 2
    np.testing.assert_allclose(base_BG.numpy()[held_out], np.tile(expected, (held_out.sum(), 1)), atol=1e-5)


def test_a_network_on_a_baseline_starts_as_the_baseline_and_keeps_controls(workspace: Workspace) -> None:
    reader, _store = reader_of(workspace, *ON_BASE)
    network = StateTransition(reader.spec).eval()
    network.set_control_feature(torch.zeros(4))
    random = torch.Generator().manual_seed(0)
    control, base = torch.rand(2, 8, 20, generator=random), torch.randn(2, 20, generator=random)
    features = torch.stack([torch.ones(4), torch.zeros(4)])
    with torch.no_grad():
        found = network(control, features, base_BG=base).log1p_BSG
        torch.testing.assert_close(found[0], (control[0] + base[0]).clamp_min(0))
        # cells lose falls below 0, and the mean over them does not
        uncut = network(control, features, base_BG=base).unclipped_BSG
        torch.testing.assert_close(uncut[0].mean(0) - control[0].mean(0), base[0])
        assert torch.equal(uncut[1], control[1])
        assert torch.equal(found[1], control[1])
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=random))
        moved = network(control, features, base_BG=base).log1p_BSG
        assert not torch.equal(moved[0], found[0])
        assert torch.equal(moved[1], control[1])
    with pytest.raises(ValueError, match="has a baseline"):
        network(control, features)


def test_what_an_untrained_network_on_a_baseline_hands_over_is_what_the_baseline_does(workspace: Workspace) -> None:
    given = [*features_of(workspace.folder), HELD_OUT]
    predicted = []
    for name, kind in (
        ("network", [*ON_BASE, "train.steps=1", "train.learning_rate=1e-12"]),
        ("ridge", ["model.kind=ridge"]),
    ):
        experiment = load_experiment(workspace.experiment, [*given, *kind])
        store = Store.open(prepare(experiment, workspace.folder / "store"))
        run = open_run(train(experiment, store.path, workspace.folder / name))
        predictor = make_predictor(run, store, open_features(run.path / "features"))
        rows_BS = store.rows(split=Split.TRAIN, pert=store.control_code)[:16].reshape(2, 8)
        predicted.append(predictor.predict(rows_BS, target="G3", context="H1"))
    network, ridge = (cells.mean(axis=0) for cells in predicted)
    np.testing.assert_allclose(network, ridge, atol=1e-5)


def test_the_whole_path_of_a_network_on_a_baseline_and_its_resumption(workspace: Workspace) -> None:
    overrides = [*ON_BASE, *features_of(workspace.folder), HELD_OUT, "loss.mae=1.0", "loss.de=0.5", "loss.rank=0.5"]
    outcome = run_experiment(workspace.experiment, workspace.out, overrides=overrides)
    assert outcome.report.ok
    for artefact in (outcome.run, outcome.parts, outcome.prediction):
        assert verify_artefact(artefact) == []
    assert open_baseline(outcome.run / "base").spec.kind == "ridge"
    stopped = workspace.folder / "stopped"
    for steps in (5, 12):
        train(load_experiment(workspace.experiment, [*overrides, f"train.steps={steps}"]), outcome.store, stopped)
    whole, again = (load_file(run / "weights.safetensors") for run in (outcome.run, stopped))
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    (outcome.run / "base" / "base.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"base/base.safetensors"):
        open_run(outcome.run)


def test_where_no_step_is_better_on_held_out_perturbations_the_baseline_stays(workspace: Workspace) -> None:
    given = [*ON_BASE, *features_of(workspace.folder), HELD_OUT.replace("test", "val"), "train.learning_rate=1.0"]
    experiment = load_experiment(workspace.experiment, [*given, "prepare.holdout_cells=0.0"])
    run = open_run(train(experiment, prepare(experiment, workspace.folder / "store"), workspace.folder / "run"))
    assert (run.step, run.metrics["last_step"]) == (0, 12)
    control = torch.rand(1, 8, 20, generator=torch.Generator().manual_seed(0))
    base = torch.linspace(-1, 1, 20)[None]
    with torch.no_grad():
        found = run.model()(control, torch.ones(1, 4), base_BG=base).log1p_BSG
    torch.testing.assert_close(found, (control + base).clamp_min(0))


@pytest.mark.parametrize("overrides", [["model.kind=mean"], [*ON_BASE, "train.steps=1"]])
def test_what_arc_state_does_not_know_is_not_exported(workspace: Workspace, overrides: list[str]) -> None:
    from pertcast.arc.import_export import export_run

    experiment = load_experiment(workspace.experiment, overrides)
    run = train(experiment, prepare(experiment, workspace.folder / "store"), workspace.folder / "run")
    with pytest.raises(CheckpointError, match="baseline"):
        export_run(run, workspace.folder / "arc")


@pytest.mark.parametrize("overrides", [["model.base=mean"], ["model.base=mean", "model.kind=ridge"]])
def test_a_base_without_a_shift_is_refused(workspace: Workspace, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="adds its shift to the base"):
        load_experiment(workspace.experiment, overrides)
