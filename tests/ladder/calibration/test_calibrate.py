"""Calibration: effects scaled without moving zeros, chosen on held-out targets alone, applied when asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conftest import write_small_h5ad
from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError, DataError
from pertcast.files.artefacts import read_json, read_manifest, verify_artefact
from pertcast.generate import generate
from pertcast.generate.calibration import Calibration, amplify, open_calibration, save_calibration
from pertcast.generate.plan import Part
from pertcast.ladder.calibration import calibrate
from pertcast.ladder.calibration.calibrate import _search
from pertcast.models.run_folder import open_run
from pertcast.progress import SILENT
from pertcast.train import train
from training_bench import EXPERIMENT, Watcher

PERTS = ("non-targeting", *(f"G{number}" for number in range(1, 11)))
FEWSHOT = """
[fewshot."small.H1"]
val = ["G1", "G2", "G3", "G4"]
test = ["G5", "G6"]
[features]
kind = "file"
path = "features.npz"
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation and test targets; nobody changes it."""
    folder = tmp_path_factory.mktemp("bench")
    write_small_h5ad(folder / "small.h5ad", perts=PERTS)
    np.savez(folder / "features.npz", gene=np.array(PERTS[1:]), embedding=np.eye(10, dtype=np.float32))
    (folder / "experiment.toml").write_text(EXPERIMENT.replace("holdout_cells = 0.2", "") + FEWSHOT)
    (folder / "targets.csv").write_text("target_gene,n_cells,median_umi_per_cell\nG5,10,500\nG7,20,500\n")
    experiment = load_experiment(folder / "experiment.toml", ["model.residual='shift'", "train.match='context'"])
    train(experiment, prepare(experiment, folder / "store"), folder / "run")
    return folder


@pytest.fixture
def folder(bench: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(bench, tmp_path / "copy"))


def parts_of(folder: Path, name: str, *overrides: str) -> dict[str, np.ndarray]:
    rules = ["num_genes=20", "num_targets=2", "max_cells=60"]
    given = [f"submission.targets={str(folder / 'targets.csv')!r}", *(f"submission.rules.{rule}" for rule in rules)]
    out = generate(folder / "run", folder / name, overrides=[*given, *overrides])
    return {path.stem: ad.read_h5ad(path).X.toarray() for path in sorted(out.glob("*/*.h5ad"))}


cells = hnp.arrays(np.float32, (5, 4), elements=st.floats(0, 8, width=16))


@given(cells, cells, st.floats(0, 4))
def test_the_mean_effect_is_scaled_and_nothing_falls_below_0(
    predicted: np.ndarray, control: np.ndarray, amplitude: float
) -> None:
    scaled = amplify(predicted, control, amplitude)
    assert (scaled >= 0).all()
    assert not scaled[(predicted == 0) & (control == 0)].any()
    wanted = np.maximum(control.mean(0) + amplitude * (predicted.mean(0) - control.mean(0)), 0)
    # a gene that is predicted nowhere cannot rise above its controls
    reachable = (predicted > 0).any(0) | (wanted <= control.mean(0))
    np.testing.assert_allclose(scaled.mean(0)[reachable], wanted[reachable], rtol=1e-3, atol=1e-3)


def test_an_amplitude_of_1_is_the_prediction_itself() -> None:
    predicted = np.ones((2, 3), dtype=np.float32)
    assert amplify(predicted, np.zeros((2, 3), dtype=np.float32), 1.0) is predicted


def test_nothing_rises_above_the_ceiling_unless_it_was_predicted_there() -> None:
    predicted, control = np.array([[0.5, 9.0], [3.0, 9.0]], dtype="f4"), np.array([[0.1, 9.0]] * 2, dtype="f4")
    scaled = amplify(predicted, control, 4.0, ceiling=8.0)
    assert scaled[1].tolist() == [8.0, 9.0]
    assert scaled[0, 0] > predicted[0, 0]


class Fake:
    """Held-out targets whose scores depend on the amplitude alone, best at `best`."""

    def __init__(self, best: float, *, steep: float = 0.2) -> None:
        self.parts = tuple(Part("", "small", "H1", f"G{number}", 8) for number in range(12))
        self._best, self._steep = best, steep

    def sizes(self) -> list[float]:
        return [1.0] * len(self.parts)

    def copies(self) -> list[dict[str, float]]:
        return [{"mae": 1.0, "pds": 0.5, "des": 0.0}] * len(self.parts)

    def scores(self, amplitudes: dict[str, float], *, spread: float) -> list[dict[str, float]]:
        del spread
        return [
            {
                "mae": 0.5 + self._steep * abs(amplitudes[part.target] - self._best) + 0.01 * number,
                "pds": 0.6,
                "des": 0.2,
            }
            for number, part in enumerate(self.parts)
        ]


def search(fake: Fake) -> Calibration:
    return _search([fake], cells="model", weights="", progress=SILENT)  # type: ignore[list-item]


def test_the_amplitude_that_scores_best_is_found() -> None:
    assert search(Fake(2.5)).amplitude == 2.5
    assert search(Fake(0.5)).amplitude == 0.5
    assert search(Fake(1.4)).amplitude == 1.5


class Noisy(Fake):
    """Targets that gain from any amplitude above 1, some much and some little, and more from 4 than from 1.5."""

    def scores(self, amplitudes: dict[str, float], *, spread: float) -> list[dict[str, float]]:
        del spread
        return [
            {
                "mae": 0.9 * max(amplitudes[part.target], 1.0),
                "pds": 0.6,
                "des": (0.2 + 0.01 * amplitudes[part.target] * (-1) ** number) if amplitudes[part.target] > 1 else 0.0,
            }
            for number, part in enumerate(self.parts)
        ]


def test_of_amplitudes_that_score_alike_the_nearest_to_1_is_taken_and_a_worse_mean_is_said() -> None:
    found = search(Noisy(1.0))
    assert found.amplitude == 1.25
    assert "worse than that of copies of controls" in found.notes[1]


def test_where_nothing_is_better_nothing_changes_and_it_says_so() -> None:
    found = search(Fake(1.0))
    assert (found.amplitude, found.slope, found.spread) == (1.0, 0.0, 1.0)
    assert "no change beats none" in found.notes[0]
    assert search(Fake(2.0, steep=0.0)).amplitude == 1.0


def test_calibration_is_part_of_the_run_and_generation_applies_it_when_asked(folder: Path) -> None:
    plain = parts_of(folder, "plain")
    with pytest.raises(CheckpointError, match="it is not calibrated; run `pertcast calibrate"):
        parts_of(folder, "none", "generate.calibrated=true")
    watcher = Watcher()
    path = calibrate(folder / "run", progress=watcher)
    assert path == folder / "run" / "calibration.json"
    assert path.name in read_manifest(folder / "run").files
    assert verify_artefact(folder / "run") == []
    found = open_calibration(folder / "run")
    assert found.num_targets == 4
    assert {"mae", "pds", "des", "overall"} == found.before.keys() == found.after.keys()
    assert any("effects x" in note for note in watcher.notes)
    assert len(found.tried) >= 11
    assert all(np.array_equal(cells, parts_of(folder, "plain2")[name]) for name, cells in plain.items())

    shutil.rmtree(folder / "plain2")
    double = {**read_json(path), "amplitude": 2.0}
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="incomplete"):
        open_run(folder / "run")
    save_calibration(folder / "run", Calibration(**{**double, "tried": (), "notes": ()}))
    scaled = parts_of(folder, "plain", "generate.calibrated=true")
    assert np.array_equal(scaled["non-targeting"], plain["non-targeting"])
    assert not np.array_equal(scaled["G7"], plain["G7"])
    assert "effects x 2" in " ".join(read_json(folder / "plain" / "plan.json")["notes"])
    again = parts_of(folder, "batch", "generate.calibrated=true", "generate.sets_per_step=1")
    assert all(np.allclose(cells, again[name], rtol=1e-5) for name, cells in scaled.items())
    with pytest.raises(ConfigError, match=r"calibrated for generate\.cells = 'model', got 'sparse'"):
        parts_of(folder, "sparse", "generate.calibrated=true", "generate.cells='sparse'")


def test_targets_that_test_are_never_looked_at(folder: Path) -> None:
    before = calibrate(folder / "run").read_bytes()
    store = Store.open(folder / "store")
    values = np.load(folder / "store" / "data.npy")
    starts = np.load(folder / "store" / "indptr.npy")
    tested = store.rows(split=Split.TEST)
    assert {store.perts[code] for code in np.unique(store.pert_codes[tested])} == {"non-targeting", "G5", "G6"}
    for row in tested:
        values[starts[row] : starts[row + 1]] = 250
    real = store.log1p(tested)
    (folder / "store" / "data.npy").unlink()
    np.save(folder / "store" / "data.npy", values)
    assert (Store.open(folder / "store").log1p(tested) != real).any()
    assert calibrate(folder / "run").read_bytes() == before


def test_a_calibration_of_other_weights_does_not_count(folder: Path) -> None:
    calibrate(folder / "run")
    experiment = load_experiment(folder / "experiment.toml", ["model.residual='shift'", "train.match='context'"])
    longer = experiment.model_copy(update={"train": experiment.train.model_copy(update={"steps": 14})})
    train(longer, folder / "store", folder / "run")
    with pytest.raises(CheckpointError, match="it is not calibrated"):
        open_calibration(folder / "run")


def test_spread_is_chosen_where_cells_are_moved_controls(folder: Path) -> None:
    calibrate(folder / "run", overrides=["generate.cells='sparse'"])
    found = open_calibration(folder / "run")
    assert {entry["spread"] for entry in found.tried} == {0.6, 0.8, 1.0, 1.2, 1.4}
    assert parts_of(folder, "sparse", "generate.calibrated=true", "generate.cells='sparse'")


def test_folds_train_without_their_targets_and_without_those_that_the_run_held_out(folder: Path) -> None:
    calibrate(folder / "run", folds=2, fold_steps=3)
    assert open_calibration(folder / "run").num_targets == 4
    validating = set()
    for fold in range(2):
        run = open_run(folder / "run_folds" / f"run_{fold}")
        assert run.metrics["last_step"] == 3
        store = Store.open(run.store_path)
        names = {
            flag: {store.perts[code] for code in np.unique(store.pert_codes[store.rows(split=flag)])}
            - {"non-targeting"}
            for flag in Split
        }
        assert names[Split.TEST] == {"G1", "G2", "G3", "G4", "G5", "G6"}
        assert len(names[Split.TRAIN]) == len(names[Split.VAL]) == 2
        assert not names[Split.TRAIN] & names[Split.VAL]
        validating |= names[Split.VAL]
    assert validating == {"G7", "G8", "G9", "G10"}


def test_too_few_held_out_targets_are_refused_with_a_way_out(folder: Path) -> None:
    text = (folder / "experiment.toml").read_text().replace('val = ["G1", "G2", "G3", "G4"]', 'val = ["G1"]')
    (folder / "experiment.toml").write_text(text)
    experiment = load_experiment(folder / "experiment.toml", ["train.steps=1"])
    train(experiment, prepare(experiment, folder / "store2"), folder / "few")
    with pytest.raises(DataError, match=r"expected at least 4 validation targets .* got 1; .*--folds 5"):
        calibrate(folder / "few")
    with pytest.raises(ConfigError, match=r"--folds: expected 2 to 7"):
        calibrate(folder / "few", folds=9)
