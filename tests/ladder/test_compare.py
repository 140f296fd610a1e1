"""`pertcast compare`: the same trials for all, nothing done twice, and a verdict that says what the intervals say."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from benchmarks.screen import ScreenConfig, draw_screen, made_up_features
from benchmarks.write_screen import write_screen

import pertcast.ladder.one_training
from pertcast.cli.app import main
from pertcast.config import load_experiment
from pertcast.errors import ConfigError
from pertcast.ladder.compare import candidates_of, compare, held_out_folds
from pertcast.ladder.comparison import Comparison, as_markdown, collect, draw_chart, verdict
from pertcast.ladder.held_out import against_truth
from pertcast.ladder.score import score
from pertcast.ladder.scored_side import PseudobulkStats, read_side

GENES = tuple(f"G{number}" for number in range(60))
SMALL = ScreenConfig(contexts=("A", "B"), num_targets=10, num_genes=50, cells_per_target=16, num_controls=40, umi=300.0)
TINY = (
    'model.preset="tiny"', "model.set_size=8", "model.hidden=16", "model.feedforward=32", "model.heads=2",
    "train.steps=4", "train.sets_per_step=2", "train.val_every=4", "train.checkpoint_every=50", "prepare.num_hvgs=20",
)  # fmt: skip


def make_screen(folder: Path, **held: int) -> Path:
    screen = draw_screen(GENES, made_up_features(GENES), SMALL)
    return write_screen(folder, screen, SMALL, **held)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_screen(tmp_path_factory.mktemp("screen"), num_val=2, num_test=4)


def test_rungs_and_seeds_are_compared_once_and_for_all(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PERTCAST_CACHE", str(tmp_path / "cache"))
    candidates = candidates_of([experiment], rungs=["c1", "c2"], models=[])
    first = compare(candidates, tmp_path / "out", seeds=1, overrides=TINY)
    assert first.candidates == ("c1", "c2")
    assert len(first.units) == 2 * 4
    assert first.values["c2"]["mae"].shape == (1, 8)
    assert np.isfinite(first.values["c2"]["mae"]).all()
    assert (first.values["ceiling"]["mae"] < first.values["baseline"]["mae"].mean()).any()

    scored: list[int] = []

    def count(predicted: PseudobulkStats, truth: PseudobulkStats) -> dict[str, dict[str, float]]:
        scored.append(1)
        return against_truth(predicted, truth)

    monkeypatch.setattr(pertcast.ladder.one_training, "against_truth", count)
    again = compare(candidates, tmp_path / "out", seeds=2, overrides=TINY)
    assert len(scored) == 2 * 2  # the new seed of two rungs in two contexts
    np.testing.assert_array_equal(again.values["c1"]["pds"][0], first.values["c1"]["pds"][0])

    sets = [item for assignment in TINY for item in ("--set", assignment)]
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "compare",
                str(experiment),
                "--rungs",
                "c1,c2",
                "--seeds",
                "2",
                "--out",
                str(tmp_path / "out"),
                *sets,
                "--json",
            ]
        )
    assert len(scored) == 2 * 2
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert printed["levels"]["c1"]["mae"]["value"] == pytest.approx(again.values["c1"]["mae"].mean())
    ElementTree.fromstring((tmp_path / "out" / "comparison.svg").read_text())
    assert "C2 against C1" in (tmp_path / "out" / "comparison.md").read_text()
    assert not list((tmp_path / "out").rglob("prediction*.h5ad"))


def keep_what_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy every file of cells that a comparison scores, predicted or real, into a folder of the test."""
    monkeypatch.setenv("PERTCAST_CACHE", str(tmp_path / "cache"))

    def read_and_keep(path: Path, *rest: Any, **options: Any) -> Any:
        shutil.copy(path, tmp_path / path.name)
        return read_side(path, *rest, **options)

    monkeypatch.setattr(pertcast.ladder.one_training, "read_side", read_and_keep)


def test_a_trial_scores_what_pertcast_score_scores(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_what_is_scored(tmp_path, monkeypatch)
    found = compare(candidates_of([experiment], rungs=["c1"], models=[]), tmp_path / "out", seeds=1, overrides=TINY)
    scored = score(tmp_path / "prediction-0.h5ad", tmp_path / "truth-0.h5ad")
    for column, (context, target, _) in enumerate(found.units):
        if context == "screen.A":
            for metric in ("mae", "pds", "des", "effect_correlation"):
                assert found.values["c1"][metric][0, column] == scored.targets[target][metric]


def test_models_stand_beside_rungs_and_each_is_compared_with_them(experiment: Path, tmp_path: Path) -> None:
    candidates = candidates_of([experiment], rungs=["c1"], models=["control", "mean"])
    found = compare(candidates, tmp_path, seeds=1, overrides=TINY)
    pairs = {(change.name, change.against) for change in found.changes}
    assert {("c1", "mean"), ("c1", "control"), ("mean", "control"), ("c1", "baseline")} <= pairs
    assert ("control", "mean") not in pairs
    np.testing.assert_array_equal(found.values["control"]["num_de_predicted"], 0)


def test_several_processes_find_the_same(experiment: Path, tmp_path: Path) -> None:
    candidates = candidates_of([experiment], rungs=["c1"], models=[])
    one, two = (compare(candidates, tmp_path / str(jobs), seeds=1, jobs=jobs, overrides=TINY) for jobs in (1, 2))
    np.testing.assert_allclose(one.values["c1"]["mae"], two.values["c1"]["mae"], rtol=1e-5)


def test_folds_hold_every_label_out_once_in_all_its_contexts_and_rank_among_all(tmp_path: Path) -> None:
    path = make_screen(tmp_path / "screen")
    divided, _ = held_out_folds(load_experiment(path), folds=3)
    tests = [fold.fewshot["screen.A"].test for fold in divided]
    assert sorted(label for test in tests for label in test) == sorted(set().union(*tests))
    assert sum(map(len, tests)) == 10
    assert tests == [fold.fewshot["screen.B"].test for fold in divided]
    found = compare(candidates_of([path], rungs=["c1"], models=[]), tmp_path / "out", seeds=1, folds=3, overrides=TINY)
    assert sorted(unit[:2] for unit in found.units) == sorted(
        (f"screen.{c}", label) for c in "AB" for test in tests for label in test
    )
    ranks = (1 - found.values["c1"]["pds"]) * 10
    np.testing.assert_allclose(ranks, ranks.round(), atol=1e-9)
    assert ranks.max() > 4  # more than the four that a fold has


def test_folds_divide_the_test_labels_where_there_are_some(experiment: Path) -> None:
    whole = load_experiment(experiment).fewshot["screen.A"]
    divided, _ = held_out_folds(load_experiment(experiment), folds=2)
    assert sorted(label for fold in divided for label in fold.fewshot["screen.A"].test) == sorted(whole.test)
    assert all(fold.fewshot["screen.A"].val == whole.val for fold in divided)
    with pytest.raises(ConfigError, match="expected 2 to 4"):
        held_out_folds(load_experiment(experiment), folds=5)


def test_without_test_labels_those_that_validate_are_compared_on_and_without_any_it_is_refused(tmp_path: Path) -> None:
    only_val = load_experiment(make_screen(tmp_path / "val", num_val=2))
    (found,), (note,) = held_out_folds(only_val, folds=0)
    assert found.fewshot["screen.A"].test == only_val.fewshot["screen.A"].val
    assert "validate" in note
    with pytest.raises(ConfigError, match="no perturbation is held out"):
        held_out_folds(load_experiment(make_screen(tmp_path / "none")), folds=0)


def test_experiments_that_hold_out_different_perturbations_are_refused(experiment: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    test = load_experiment(experiment).fewshot["screen.A"].test[0]
    text = experiment.read_text().replace(f'"{test}", ', "").replace(f', "{test}"', "")
    for name in ("screen.h5ad", "features.npz", "gene_names.csv"):
        text = text.replace(f'"{name}"', f'"{experiment.parent / name}"')
    other.write_text(text)
    with pytest.raises(ConfigError, match="different perturbations"):
        compare(candidates_of([experiment, other], rungs=[], models=[]), tmp_path / "out", seeds=1, overrides=TINY)


def made_comparison(gain: float, spread: float = 0.01) -> Comparison:
    random = np.random.default_rng(0)
    targets = [f"T{number}" for number in range(20)]

    def scores(mae: float, des: float) -> dict[str, dict[str, dict[str, float]]]:
        return {
            "A": {
                target: {
                    "mae": mae + random.normal(scale=spread) * mae,
                    "des": des + random.normal(scale=spread),
                    "pds": 0.6,
                    "effect_correlation": 0.3,
                    "num_de_predicted": 5,
                    "effect_size": float(place),
                }
                for place, target in enumerate(targets)
            }
        }

    trials = [(name, 0, seed, scores(mae, 0.2)) for seed in range(3) for name, mae in (("c1", 1.0), ("c2", 1.0 - gain))]
    return collect(trials, [{"baseline": scores(1.2, 0.1), "ceiling": scores(0.5, 0.5)}], num_resamples=500)


def test_the_verdict_names_what_changed_by_how_much_and_what_did_not() -> None:
    (step, *_) = verdict(made_comparison(0.12))
    assert step.startswith("C2 against C1: lowers MAE by 12.")
    assert "unchanged: DES" in step
    assert "PDS (+0.000 [0.000, 0.000])" in step
    (step, *_) = verdict(made_comparison(-0.12))
    assert "raises MAE by 1" in step
    assert step.endswith("It does harm to MAE, overall.")
    (step, *_) = verdict(made_comparison(0.0, spread=0.2))
    assert "unchanged: MAE" in step


def test_the_overall_is_that_of_the_means_against_the_baseline() -> None:
    found = made_comparison(0.1)
    mae, des = (found.levels["c2"][name].value for name in ("mae", "des"))
    base_mae, base_des = (found.levels["baseline"][name].value for name in ("mae", "des"))
    expected = ((base_mae - mae) / base_mae + (des - base_des) / (1 - base_des) + 0) / 3
    assert found.levels["c2"]["overall"].value == pytest.approx(expected)
    assert found.levels["baseline"]["overall"] == (0, 0, 0)
    assert found.levels["c2"]["overall"].low < expected < found.levels["c2"]["overall"].high


def test_strata_are_thirds_by_the_size_of_the_real_effect_and_the_chart_shows_all() -> None:
    found = made_comparison(0.1)
    assert list(found.strata) == ["weak", "middle", "strong"]
    weak = found.values["c1"]["mae"][:, :7].mean()
    assert found.strata["weak"]["c1"]["mae"].value == pytest.approx(weak)
    drawing = draw_chart(found)
    assert drawing.count("<g>") == 5 * 4
    assert "strong effects" in as_markdown(found)


def test_counts_are_compared_as_pertcast_score_compares_files_of_counts(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_what_is_scored(tmp_path, monkeypatch)
    in_counts = (*TINY, "generate.scale=counts", "generate.cells=donors")
    candidates = candidates_of([experiment], rungs=[], models=["mean"])
    found = compare(candidates, tmp_path / "out", seeds=1, overrides=in_counts)
    sides = [ad.read_h5ad(tmp_path / name) for name in ("prediction-0.h5ad", "truth-0.h5ad")]
    depths = []
    for side in sides:
        values = side.X.toarray()
        assert (values == np.rint(values)).all()
        assert values.max() > 8  # no log1p value of 300 counts
        depths.append(np.median(values.sum(axis=1)))
    assert depths[0] == pytest.approx(depths[1], rel=0.05)
    scored = score(tmp_path / "prediction-0.h5ad", tmp_path / "truth-0.h5ad")
    columns = [(column, target) for column, (context, target, _) in enumerate(found.units) if context == "screen.A"]
    for column, target in columns:
        for metric in ("mae", "pds", "des", "effect_correlation"):
            assert found.values["mean"][metric][0, column] == scored.targets[target][metric]
    # the baseline, on the truth's own scale: cell by cell, in a plain loop
    raw = ad.read_h5ad(experiment.parent / "screen.h5ad")
    held = {target for context, target, _ in found.units if context == "screen.A"}
    held |= set(load_experiment(experiment).fewshot["screen.A"].val)
    mine = raw.obs["cell_type"] == "A"
    means = []
    for target in sorted(set(raw.obs["target_gene"][mine]) - held - {"non-targeting"}):
        cells = raw[(mine & (raw.obs["target_gene"] == target)).to_numpy()].X.toarray()
        means.append(np.mean([np.log1p(cell * depths[1] / cell.sum()) for cell in cells], axis=0))
    truth = sides[1][(sides[1].obs["target_gene"] == columns[0][1]).to_numpy()].X.toarray()
    real = np.mean([np.log1p(cell * depths[1] / cell.sum()) for cell in truth], axis=0)
    expected = np.abs(np.mean(means, axis=0) - real).mean()
    assert found.values["baseline"]["mae"][0, columns[0][0]] == pytest.approx(expected, rel=1e-4)


def test_counts_and_log1p_values_are_not_compared_with_each_other(experiment: Path, tmp_path: Path) -> None:
    other = tmp_path / "counts.toml"
    text = experiment.read_text()
    for name in ("screen.h5ad", "features.npz", "gene_names.csv"):
        text = text.replace(f'"{name}"', f'"{experiment.parent / name}"')
    assert "scale" not in text
    if "[generate]" in text:
        text = text.replace("[generate]", '[generate]\nscale = "counts"')
    else:
        text += '\n[generate]\nscale = "counts"\n'
    other.write_text(text)
    with pytest.raises(ConfigError, match="some make counts and some log1p"):
        compare(candidates_of([experiment, other], rungs=[], models=[]), tmp_path / "out", seeds=1, overrides=TINY)
