"""Which validated step is kept: the official metrics in training are those of `pertcast score` on the same cells."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from benchmarks.screen import ScreenConfig, draw_screen, made_up_features
from benchmarks.write_screen import write_screen
from scipy import sparse

from pertcast.config import Experiment, load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError
from pertcast.ladder.mean_baseline import constant_side
from pertcast.ladder.score import compare_sides
from pertcast.ladder.scored_side import PseudobulkStats
from pertcast.models.run_folder import open_run
from pertcast.stats.metrics import constant_profile, profile_of, score_profiles
from pertcast.train import train
from pertcast.train.validation import _profile

GENES = tuple(f"G{number}" for number in range(60))
SMALL = ScreenConfig(contexts=("A", "B"), num_targets=10, num_genes=50, cells_per_target=16, num_controls=40, umi=300.0)
TINY = (
    'model.preset="tiny"', "model.set_size=8", "model.hidden=16", "model.feedforward=32", "model.heads=2",
    "train.steps=6", "train.sets_per_step=2", "train.val_every=2", "train.checkpoint_every=3", "prepare.num_hvgs=20",
    "train.learning_rate=1e-2", 'model.residual="shift"',
)  # fmt: skip
METRICS = ("mae", "pds", "des", "overall")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    screen = draw_screen(GENES, made_up_features(GENES), SMALL)
    return write_screen(tmp_path_factory.mktemp("screen"), screen, SMALL, num_val=4)


def trained(path: Path, out: Path, *overrides: str) -> tuple[Path, list[dict[str, float]]]:
    experiment: Experiment = load_experiment(path, [*TINY, *overrides])
    run = train(experiment, prepare(experiment, path.parent / "store"), out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, [line for line in lines if line["kind"] == "val"]


@pytest.mark.parametrize("by", METRICS)
def test_the_step_that_is_kept_is_the_best_by_what_was_asked_for(path: Path, tmp_path: Path, by: str) -> None:
    run, validations = trained(path, tmp_path / "run", f"train.select_by={by}")
    assert all(f"held_out_{name}" in line for line in validations for name in METRICS)
    sign = 1 if by == "mae" else -1
    best = min(validations, key=lambda line: sign * line[f"held_out_{by}"])  # the first of equal ones
    kept = open_run(run)
    assert kept.step == best["step"]
    assert kept.metrics["val_loss"] == best["loss"]
    assert kept.metrics["selected_by"] == by


def test_selection_changes_no_step_and_goes_on_where_it_stopped(path: Path, tmp_path: Path) -> None:
    plain, _ = trained(path, tmp_path / "plain")
    selected, whole = trained(path, tmp_path / "selected", "train.select_by=overall")
    newest = sorted((plain / "checkpoints").iterdir())[-1].name
    weights = [(run / "checkpoints" / newest / "weights.safetensors").read_bytes() for run in (plain, selected)]
    assert weights[0] == weights[1]
    trained(path, tmp_path / "parts", "train.select_by=overall", "train.steps=3")
    again, parts = trained(path, tmp_path / "parts", "train.select_by=overall")
    assert [line for line in parts if line["step"] % 2 == 0] == whole
    assert open_run(again).step == open_run(selected).step


def test_without_validation_perturbations_only_the_loss_selects(tmp_path: Path) -> None:
    screen = draw_screen(GENES, made_up_features(GENES), SMALL)
    path = write_screen(tmp_path / "screen", screen, SMALL, num_test=2)
    with pytest.raises(ConfigError, match="list some as val"):
        trained(path, tmp_path / "run", "train.select_by=pds")


def test_an_effect_of_another_context_may_take_more_than_there_is(tmp_path: Path) -> None:
    screen = draw_screen(GENES, made_up_features(GENES), SMALL)
    path = write_screen(tmp_path / "screen", screen, SMALL, num_val=SMALL.num_targets, held_out_in=["B"])
    cells = ad.read_h5ad(path.parent / "screen.h5ad")
    is_seen = ((cells.obs["cell_type"] == "A") & (cells.obs["target_gene"] == "non-targeting")).to_numpy()
    counts = cells.X.toarray()
    # a gene that all targets silence in one context, and that the other context never shows
    counts[:, 0] = is_seen
    ad.AnnData(sparse.csr_matrix(counts), obs=cells.obs, var=cells.var).write_h5ad(path.parent / "screen.h5ad")
    _, validations = trained(path, tmp_path / "run", "train.select_by=mae")
    assert all(np.isfinite(line["held_out_mae"]) for line in validations)


def test_the_mean_that_selects_is_the_predicted_one_before_cells_are_cut_off() -> None:
    cells = np.array([[-1.0, 1.0], [2.0, 0.0], [0.5, -3.0]], dtype=np.float32)
    controls = sparse.csr_matrix(np.array([[1.0, 1.0], [0.0, 1.0]], dtype=np.float32))
    found = _profile(cells, np.array([0, 0, 1]), controls)
    np.testing.assert_allclose(found.means, [[0.5, 0.5], [0.5, 0.0]])
    np.testing.assert_allclose(found.effects, [[0.0, -0.5], [0.0, -1.0]])
    # fold changes and calls are those of the cells
    np.testing.assert_allclose(found.log2_fold_change[0, 0], np.log2(np.expm1(1.0) / np.expm1(0.5)), rtol=1e-6)


def side_of(store: Store, rows: list[np.ndarray], controls: np.ndarray) -> PseudobulkStats:
    codes = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    profile = profile_of(store.csr(np.concatenate(rows)), codes, store.csr(controls))
    return PseudobulkStats(
        perts=tuple(f"G{number}" for number in range(len(rows))),
        genes=store.genes,
        num_cells=np.array([len(part) for part in rows]),
        means_log1p=profile.means,
        control_mean_log1p=profile.means[0] - profile.effects[0],
        significant=profile.significant,
        log2_fold_change=profile.log2_fold_change.astype(np.float32),
    )


def test_profiles_score_as_the_official_metrics_do(path: Path) -> None:
    store = Store.open(prepare(load_experiment(path, TINY), path.parent / "store"))
    controls = store.rows(split=Split.TRAIN, context=0, pert=store.control_code)
    perts = [code for code, name in enumerate(store.perts) if name != store.control][:6]
    whole = [store.rows(split=Split.TRAIN | Split.VAL, context=0, pert=code) for code in perts]
    first, second = [part[::2] for part in whole], [part[1::2] for part in whole]
    sides = side_of(store, first, controls), side_of(store, second, controls)
    official = compare_sides(*sides)
    profiles = [
        profile_of(
            store.csr(np.concatenate(half)),
            np.repeat(np.arange(len(half)), [len(part) for part in half]),
            sparse.csr_matrix(store.csr(controls)),
        )
        for half in (first, second)
    ]
    own_gene = np.array([store.genes.index(name) if name in store.genes else -1 for name in sides[0].perts])
    ours = score_profiles(profiles[0], profiles[1], own_gene)
    for row, name in enumerate(sides[0].perts):
        assert {metric: values[row] for metric, values in ours.items()} == pytest.approx(
            {metric: official[name][metric] for metric in ours}
        )
    constant = np.asarray(store.csr(np.concatenate(whole)).mean(axis=0)).ravel().astype(np.float32)
    found = constant_profile(constant, sides[1].num_cells, store.csr(controls))
    expected = constant_side(constant, store.csr(controls), sides[1])
    np.testing.assert_array_equal(found.significant, expected.significant)
    np.testing.assert_allclose(found.log2_fold_change, expected.log2_fold_change, rtol=1e-6)
