"""The offset: what a network gets wrong of a new line as a whole, in closed form."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pertcast.train.closed_form
from adapt_bench import Bench, changed
from conftest import write_small_h5ad
from pertcast.config import AdaptConfig
from pertcast.data.cell_sets import CellSets
from pertcast.data.features import open_features
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError
from pertcast.models.few_parameters import last_layer, parse_learn
from pertcast.models.run_folder import Run, open_run
from pertcast.train.batches import SetReader
from pertcast.train.closed_form import common_share, offset_of, predict_sets
from pertcast.train.new_line import adapted_experiment
from training_bench import Watcher

BIAS = "project_out.3.bias"
ALONE = "adapt.trainable='offset'"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Path:
    return bench.train("plain", "train.steps=30", "train.learning_rate=0.02")


@pytest.fixture(scope="module")
def shifting(bench: Bench) -> Path:
    return bench.train("shifting", "model.residual='shift'", "train.steps=30", "train.learning_rate=0.02")


def errors_of(run: Run) -> dict[str, np.ndarray]:
    """What is missing in the mean that a run predicts of each training label, from all control cells, cell by cell."""
    store, network = Store.open(run.store_path), run.model()
    features = open_features(run.path / "features")
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code))
    found = {}
    for code, name in enumerate(store.perts):
        rows = store.rows(split=Split.TRAIN, pert=code)
        if len(rows):
            feature = torch.from_numpy(features.of([name]))
            with torch.no_grad():
                cells = network(torch.from_numpy(controls)[None], feature, None, torch.tensor([2])).log1p_BSG
            found[name] = store.log1p(rows).mean(0, dtype=np.float64) - cells[0].mean(0).numpy()
    return found


@pytest.mark.parametrize(("share", "name"), [(0.0, "controls"), (1.0, "targets")])
def test_an_offset_makes_good_the_error_on_controls_and_what_targets_share_beside_it(
    bench: Bench, plain: Path, share: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pertcast.train.closed_form, "common_share", lambda _: share)
    adapted = open_run(bench.adapt(plain, f"of_{name}", ALONE))
    assert changed(plain, adapted.path) == {BIAS, "context_encoder.weight"}
    assert not load_file(adapted.path / "weights.safetensors")["context_encoder.weight"].any()
    assert (adapted.step, adapted.metrics["offset_share"]) == (0, share)
    assert adapted.metrics["num_learning"] == len(adapted.genes)
    errors = errors_of(adapted)
    assert set(errors) == {"non-targeting", "G1", "G2"}
    left = np.mean([errors[label] for label in (("G1", "G2") if share else ("non-targeting",))], axis=0)
    np.testing.assert_allclose(left, 0, atol=0.06)  # sets are not all control cells at once
    assert np.abs(errors["G1"] - errors["non-targeting"]).max() > 0.2  # what a target has alone stays missing


def test_an_offset_is_the_same_to_the_bit_and_says_what_it_did(bench: Bench, plain: Path) -> None:
    watcher = Watcher()
    first = bench.adapt(plain, "first", ALONE, progress=watcher)
    assert changed(first, bench.adapt(plain, "second", ALONE)) == set()
    share = open_run(first).metrics["offset_share"]
    assert any(f"training targets {share:.3f}" in note for note in watcher.notes)
    assert any("validation cells are not used" in note for note in watcher.notes)


def test_an_offset_reads_training_cells_alone(bench: Bench, plain: Path, tmp_path: Path) -> None:
    other = Bench(tmp_path)
    cells = ad.read_h5ad(bench.folder / "line.h5ad")
    held_out = (cells.obs["target_gene"] == "G3").to_numpy()
    matrix = cells.X.toarray()
    matrix[held_out] = matrix[held_out][:, ::-1]  # the totals stay, so that cells are normalised as before
    cells.X = matrix
    cells.write_h5ad(tmp_path / "line.h5ad")
    assert changed(bench.adapt(plain, "before", ALONE), other.adapt(plain, "after", ALONE)) == set()


def test_steps_start_at_the_offset(bench: Bench, plain: Path) -> None:
    alone = bench.adapt(plain, "alone", ALONE)
    both = bench.adapt(plain, "both", "adapt.trainable='offset,context'", "adapt.learning_rate=1e-30")
    assert changed(alone, both) == set()
    learnt = open_run(bench.adapt(plain, "learnt", "adapt.trainable='offset,bias'"))
    assert learnt.metrics["num_learning"] == len(learnt.genes)
    assert learnt.metrics["last_step"] == 9


def test_a_shift_knows_its_controls_and_one_target_says_nothing_of_others(
    bench: Bench, shifting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bench(tmp_path)
    write_small_h5ad(tmp_path / "line.h5ad", perts=("non-targeting", "G1", "G3"), contexts=("K2",))
    assert changed(shifting, other.adapt(shifting, "out", ALONE)) == {"context_encoder.weight"}
    monkeypatch.setattr(pertcast.train.closed_form, "common_share", lambda _: 0.5)
    assert BIAS in changed(shifting, bench.adapt(shifting, "two", ALONE))


def test_what_the_last_layer_says_is_read_before_it_is_cut_off(bench: Bench, plain: Path) -> None:
    run = open_run(bench.adapt(plain, "negative", ALONE))
    network = run.model()
    experiment = adapted_experiment(plain, bench.experiment())
    reader = SetReader(Store.open(run.store_path), experiment, open_features(run.path / "features"))
    with torch.no_grad():
        last_layer(network).bias.sub_(100)
    for _, _, output_BSO in predict_sets(network, reader, reader.training(0)):
        assert (output_BSO < -50).all()


def test_the_common_share_is_that_of_draws() -> None:
    random = np.random.default_rng(0)
    common, own = random.normal(size=4000), random.normal(size=(4, 4000))
    errors = torch.from_numpy(0.7 * common + own)
    # a variance of 0.49 that is common, and of 1 / 4 that is chance in the mean
    assert common_share(errors) == pytest.approx(0.49 / 0.74, abs=0.03)
    best = min(np.linspace(0, 1, 101), key=lambda share: np.abs(share * errors.mean(0).numpy() - 0.7 * common).mean())
    assert common_share(errors) == pytest.approx(best, abs=0.05)
    assert common_share(torch.from_numpy(own)) < 0.05
    assert common_share(torch.stack([errors[0], -errors[0]])) == 0
    assert common_share(errors[:1]) == 0
    assert common_share(torch.zeros(3, 2)) == 0


def test_a_gene_that_should_stay_silent_moves_as_little_as_it_can() -> None:
    cells, weights = torch.tensor([[-3.0, 1.0], [-2.0, -1.0]]), torch.full((2,), 0.5)
    moved = offset_of(cells, weights, torch.zeros(2))
    torch.testing.assert_close(moved, torch.tensor([0.0, -1.0]), atol=1e-5, rtol=0)


def test_offset_and_gain_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="both find the last bias"):
        parse_learn("gain,offset")


def test_the_default_is_the_offset_and_needs_no_validation_targets(bench: Bench, plain: Path, tmp_path: Path) -> None:
    assert AdaptConfig().trainable == "offset"
    other = Bench(tmp_path)
    text = (tmp_path / "line.toml").read_text().replace('trainable = "context,bias"', "").replace('val = ["G3"]', "")
    (tmp_path / "line.toml").write_text(text)
    watcher = Watcher()
    adapted = open_run(other.adapt(plain, "default", progress=watcher))
    assert set(errors_of(adapted)) == {"non-targeting", "G1", "G2", "G3"}
    assert (adapted.metrics["last_step"], adapted.metrics["offset_share"] is None) == (0, False)
    assert not any("validation" in note for note in watcher.notes)


def test_sets_are_looked_at_in_turn_and_no_target_takes_all() -> None:
    pert = np.array([0, 0, 0, 1, 0, 2, 2], dtype=np.int32)
    rows = np.arange(7)[:, None]
    one = np.zeros_like(pert)
    sets = CellSets(pert=pert, context=one, screen=one, pert_rows=rows, control_rows=rows)
    assert pertcast.train.closed_form._in_turn(sets, 2).pert_rows[:, 0].tolist() == [0, 3, 5, 1, 6]


def test_a_baseline_stays_that_of_the_other_lines_and_the_offset_mends_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.train("on_mean", "model.residual='shift'", "model.base='mean'", "train.steps=30")
    monkeypatch.setattr(pertcast.train.closed_form, "common_share", lambda _: 1.0)
    watcher = Watcher()
    adapted = open_run(bench.adapt(run, "on_mean_adapted", ALONE, progress=watcher))
    before, after = open_run(run).baseline(), adapted.baseline()
    assert before is not None
    assert after is not None
    np.testing.assert_allclose(after.mean_CG[2], before.mean_CG[-1], atol=1e-6)
    assert any("mean baseline is unchanged: the offset" in note for note in watcher.notes)
    store, network = Store.open(adapted.store_path), adapted.model()
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code))
    left = []
    for name in ("G1", "G2"):
        feature = torch.from_numpy(open_features(adapted.path / "features").of([name]))
        base = torch.from_numpy(after.mean_CG[2:3])
        with torch.no_grad():
            cells = network(torch.from_numpy(controls)[None], feature, None, torch.tensor([2]), base).log1p_BSG[0]
        real = store.log1p(store.rows(split=Split.TRAIN, pert=store.perts.index(name)))
        left.append(real.mean(0, dtype=np.float64) - cells.mean(0).numpy())
    np.testing.assert_allclose(np.mean(left, axis=0), 0, atol=0.06)
