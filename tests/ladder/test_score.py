"""`pertcast score` against cell-eval: the same numbers on real and simulated cells of many kinds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import sparse

import pertcast.ladder.mean_baseline
from pertcast.cli.app import main
from pertcast.errors import ConfigError, DataError
from pertcast.ladder import score as official
from pertcast.ladder.mean_baseline import TrainingMean
from pertcast.ladder.score import Score, score
from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN
from pertcast.submission.check import check

Matrix = NDArray[np.floating]
NAMES = {"mae": "mae", "pds": "discrimination_score_l1", "des": "overlap_at_N", "effect_correlation": "pearson_delta"}


@dataclass(frozen=True)
class Pair:
    """A prediction, the truth, and a worse prediction as the baseline."""

    predicted: Path
    real: Path
    baseline: Path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTCAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_cells(
    path: Path, values: Matrix, labels: NDArray[Any], genes: list[str], *, layout: str = "csr", context: str = ""
) -> Path:
    obs = pd.DataFrame({PERT_COLUMN: pd.Categorical(labels)}, index=[f"cell{row}" for row in range(len(labels))])
    if context:
        obs["context"] = pd.Categorical([context] * len(labels))
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.array}[layout](values)  # type: ignore[operator]
    ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path)
    return path


def simulate(
    folder: Path,
    *,
    perts: tuple[str, ...] = ("G1", "G2", "G3", "G4", "G5"),
    num_cells: int = 50,
    num_genes: int = 120,
    strength: float = 3.0,
    predicted_strength: float = 3.0,
    rate: float = 4.0,
    scales: tuple[str, str] = ("counts", "counts"),
    layouts: tuple[str, str] = ("csr", "csr"),
    dtype: type = np.float32,
) -> Pair:
    """Write Poisson cells in which each perturbation changes its own ten genes."""
    rng = np.random.default_rng(7)
    genes = [f"G{number}" for number in range(num_genes)]
    means = rng.gamma(1.0, rate, size=num_genes)

    def cells(name: str, seed: int, factor: float, scale: str, layout: str) -> Path:
        random = np.random.default_rng(seed)
        labels = np.repeat([*perts, CONTROL_LABEL], [*[num_cells] * len(perts), 2 * num_cells])
        random.shuffle(labels)
        expected = np.tile(means, (len(labels), 1))
        for number, pert in enumerate(perts):
            expected[labels == pert, 10 * number : 10 * number + 10] *= factor
        counts: Matrix = random.poisson(expected).astype(dtype)
        if scale == "log1p":
            counts = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 500).astype(dtype)
        return write_cells(folder / f"{name}.h5ad", counts, labels, genes, layout=layout)

    return Pair(
        cells("predicted", 1, predicted_strength, scales[0], layouts[0]),
        cells("real", 2, strength, scales[1], layouts[1]),
        cells("baseline", 3, 1.2, scales[0], layouts[0]),
    )


def halves_of(folder: Path, counts: Matrix, labels: NDArray[Any], genes: list[str], *, log1p: bool) -> Pair:
    """Write one half of real cells as the prediction of the other; as the baseline, control cells under every label."""
    values = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4) if log1p else counts
    values = values.astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    shares = [order[np.arange(len(order)) % 2 == part] for part in (0, 1)]
    paths = [
        write_cells(folder / f"{name}.h5ad", values[rows], labels[rows], genes)
        for name, rows in zip(("predicted", "real"), shares, strict=True)
    ]
    mixed = values[shares[0]].copy()
    control = np.flatnonzero(labels[shares[0]] == CONTROL_LABEL)
    mixed[:] = mixed[np.random.default_rng(1).choice(control, size=len(mixed))]
    return Pair(paths[0], paths[1], write_cells(folder / "baseline.h5ad", mixed, labels[shares[0]], genes))


def real_h1(folder: Path, shared: Path) -> Pair:
    cells = ad.read_h5ad(shared / "H1-VCC-2025-training.h5ad")
    return halves_of(
        folder, cells.X.toarray(), cells.obs["target_gene"].to_numpy(str), list(cells.var_names), log1p=False
    )


def real_k562(folder: Path, shared: Path) -> Pair:
    cells = ad.read_h5ad(shared / "four_contexts.h5ad")
    cells = cells[cells.obs["cell_type"] == "k562"]
    labels = cells.obs["perturbation"].to_numpy(str)
    labels = np.where(labels == "control", CONTROL_LABEL, labels)
    return halves_of(folder, cells.X.toarray(), labels, list(cells.var_names), log1p=True)


CASES: dict[str, Callable[[Path, Path], Pair]] = {
    "real H1 counts": real_h1,
    "real K562 log1p, pairs as labels": real_k562,
    "many ties": lambda folder, _: simulate(folder, rate=0.3, strength=8, predicted_strength=6),
    "no DE gene on either side": lambda folder, _: simulate(folder, strength=1, predicted_strength=1, num_cells=12),
    "no real DE gene": lambda folder, _: simulate(folder, strength=1, num_cells=12),
    "more predicted than real DE genes": lambda folder, _: simulate(folder, strength=1.5, predicted_strength=4),
    "one target": lambda folder, _: simulate(folder, perts=("G1",)),
    "own genes are missing": lambda folder, _: simulate(folder, perts=("OTHER", "G2", "G1+G2")),
    "log1p predicted, counts real": lambda folder, _: simulate(folder, scales=("log1p", "counts")),
    "dense and column-wise": lambda folder, _: simulate(folder, layouts=("dense", "csc")),
    "dense counts": lambda folder, _: simulate(folder, layouts=("csr", "dense"), rate=0.5),
    "double precision": lambda folder, _: simulate(folder, dtype=np.float64, scales=("log1p", "log1p")),
}


def run_cell_eval(predicted: Path, real: Path, out: Path) -> tuple[pd.DataFrame, Path]:
    """Return the metrics of each target by cell-eval, and where it wrote the aggregates."""
    cell_eval = pytest.importorskip("cell_eval")
    evaluator = cell_eval.MetricsEvaluator(
        adata_pred=str(predicted),
        adata_real=str(real),
        control_pert=CONTROL_LABEL,
        pert_col=PERT_COLUMN,
        num_threads=1,
        outdir=str(out),
    )
    evaluator.compute(profile="vcc", basename="vcc.csv", break_on_error=True)
    results, _ = evaluator.compute(profile="minimal", basename="results.csv", break_on_error=True)
    return results.to_pandas().set_index("perturbation"), out / "agg_vcc.csv"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_cell_eval(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    cell_eval = pytest.importorskip("cell_eval")
    shared = request.getfixturevalue("shared_data") if case.startswith("real") else tmp_path
    pair = CASES[case](tmp_path, shared)
    found = score(pair.predicted, pair.real, baseline=pair.baseline)
    theirs, aggregate = run_cell_eval(pair.predicted, pair.real, tmp_path / "scored")
    assert set(found.targets) == set(theirs.index)
    for target, values in found.targets.items():
        for ours, name in NAMES.items():
            assert values[ours] == pytest.approx(theirs.loc[target, name], abs=1e-6, nan_ok=True), (target, name)
        assert values["num_de_real"] == theirs.loc[target, "de_nsig_counts_real"]
        assert values["num_de_predicted"] == theirs.loc[target, "de_nsig_counts_pred"]
    _, of_baseline = run_cell_eval(pair.baseline, pair.real, tmp_path / "baseline")
    table = cell_eval.score_agg_metrics(str(aggregate), str(of_baseline)).to_pandas().set_index("metric")
    assert found.overall["overall"] == pytest.approx(table.loc["avg_score", "from_baseline"], abs=1e-6)
    for ours in ("mae", "pds", "des"):
        assert max(np.nan_to_num(found.relative[ours]), 0) == pytest.approx(
            table.loc[NAMES[ours], "from_baseline"], abs=1e-6
        )
    assert score(pair.predicted, pair.real, baseline=of_baseline).overall == pytest.approx(found.overall, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["csr", "dense"])
@pytest.mark.parametrize("max_values", [1, 1 << 27])
def test_the_mean_of_training_cells_is_the_baseline_of_cell_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, max_values: int
) -> None:
    cell_eval = pytest.importorskip("cell_eval")
    monkeypatch.setattr(pertcast.ladder.mean_baseline, "_MAX_VALUES", max_values)
    pair = simulate(tmp_path)
    (tmp_path / "other").mkdir()
    training = simulate(tmp_path / "other", perts=("G7", "G8", "G9"), layouts=(layout, "csr"), num_cells=30).predicted
    cells = ad.read_h5ad(pair.real)
    real = tmp_path / "uneven.h5ad"
    cells[np.flatnonzero((cells.obs[PERT_COLUMN] != "G2") | (np.arange(cells.n_obs) % 3 > 0))].write_h5ad(real)
    sizes = ad.read_h5ad(real).obs[PERT_COLUMN].value_counts().rename_axis(PERT_COLUMN).reset_index(name="n_cells")
    sizes.to_csv(tmp_path / "counts.csv", index=False)
    cell_eval.build_base_mean_adata(
        str(training), counts_df=str(tmp_path / "counts.csv"), output_path=str(tmp_path / "mean.h5ad")
    )
    found = score(pair.predicted, real, baseline=TrainingMean(training))
    theirs, _ = run_cell_eval(tmp_path / "mean.h5ad", real, tmp_path / "out")
    for ours in ("mae", "pds", "des"):
        assert found.baseline[ours] == pytest.approx(theirs[NAMES[ours]].mean(), abs=1e-6)
    with pytest.raises(SystemExit) as end:
        main(["score", str(pair.predicted), str(real), "--baseline-from", str(training), "--baseline", str(training)])
    assert end.value.code == 1


@pytest.mark.filterwarnings("ignore")
def test_the_ceiling_is_that_of_cell_eval(tmp_path: Path) -> None:
    cell_eval = pytest.importorskip("cell_eval")
    pair = simulate(tmp_path, num_cells=41)
    found = score(pair.predicted, pair.real, ceiling=True).ceiling
    evaluator = cell_eval.MetricsEvaluator(
        adata_pred=None,
        adata_real=str(pair.real),
        control_pert=CONTROL_LABEL,
        pert_col=PERT_COLUMN,
        num_threads=1,
        outdir=str(tmp_path / "out"),
    )
    results, aggregate = evaluator.compute_ceiling(profile="minimal", write_csv=False, break_on_error=True)
    means = results.drop("perturbation").mean().to_dicts()[0]
    for ours, name in NAMES.items():
        assert found[ours] == pytest.approx(means[name], abs=1e-6)
    for ours in ("pds", "des", "effect_correlation"):
        assert found[f"{ours}_full"] == pytest.approx(aggregate.to_dicts()[0][NAMES[ours]], abs=1e-6)


def test_a_perfect_prediction_scores_perfectly(tmp_path: Path) -> None:
    pair = simulate(tmp_path)
    found = score(pair.real, pair.real, baseline=pair.baseline)
    assert found.overall["mae"] == 0
    assert found.overall["pds"] == found.overall["des"] == found.overall["overall"] == 1
    assert found.overall["effect_correlation"] == pytest.approx(1)


def test_the_truth_is_kept_by_content_and_a_damaged_copy_is_made_again(tmp_path: Path, cache: Path) -> None:
    pair = simulate(tmp_path)
    first = score(pair.predicted, pair.real)
    (kept,) = cache.glob("*.npz")
    moved = pair.real.rename(tmp_path / "moved.h5ad")
    assert score(pair.predicted, moved) == first
    kept.write_bytes(kept.read_bytes()[:500])
    assert score(pair.predicted, moved) == first
    assert len(list(cache.glob("*.npz"))) == 1
    assert score(pair.predicted, pair.baseline) != first
    assert len(list(cache.glob("*.npz"))) == 2


def test_other_targets_or_genes_are_named(tmp_path: Path) -> None:
    pair = simulate(tmp_path)
    cells = ad.read_h5ad(pair.predicted)
    cells[cells.obs[PERT_COLUMN] != "G3"].write_h5ad(tmp_path / "fewer.h5ad")
    with pytest.raises(DataError, match=r"lacks 1 targets of .*real.h5ad: G3"):
        score(tmp_path / "fewer.h5ad", pair.real)
    cells[:, ["G1", "G0", *cells.var_names[2:]]].write_h5ad(tmp_path / "turned.h5ad")
    with pytest.raises(DataError, match="position 0: expected 'G0', got 'G1'"):
        score(tmp_path / "turned.h5ad", pair.real)
    cells[:, cells.var_names[2:]].write_h5ad(tmp_path / "narrow.h5ad")
    with pytest.raises(DataError, match=r"lacks 2 genes of .*: G0, G1"):
        score(tmp_path / "narrow.h5ad", pair.real)


def test_files_without_control_or_without_truth_are_refused(tmp_path: Path) -> None:
    pair = simulate(tmp_path)
    with pytest.raises(DataError, match="expected control cells 'control', got 'G1'"):
        score(pair.predicted, pair.real, rules={"control_label": "control"})
    with pytest.raises(DataError, match="no such file"):
        score(pair.predicted, tmp_path / "nowhere.h5ad")
    cells = ad.read_h5ad(pair.predicted)
    cells[cells.obs[PERT_COLUMN] == CONTROL_LABEL].write_h5ad(tmp_path / "controls.h5ad")
    with pytest.raises(DataError, match="expected cells of another label"):
        score(tmp_path / "controls.h5ad", pair.real)


def test_a_baseline_that_says_no_scores_is_refused(tmp_path: Path) -> None:
    pair = simulate(tmp_path)
    for name, text in (("a.json", '{"overall": {"mae": 1}}'), ("b.json", "{"), ("c.csv", "statistic,mae\nmean,1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=r"missing|not the scores"):
            score(pair.predicted, pair.real, baseline=tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        score(pair.predicted, pair.real, baseline=tmp_path / "none.json")


def test_targets_without_real_de_genes_and_ties_at_the_cut_are_noted(tmp_path: Path) -> None:
    pair = simulate(tmp_path, strength=1, num_cells=12)
    assert "5 of 5 targets have no DE gene" in " ".join(score(pair.predicted, pair.real).notes)


def test_the_command_prints_json_that_serves_as_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = simulate(tmp_path)
    arguments = ["score", str(pair.predicted), str(pair.real), "--season", "vcc2025"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"mae", "pds", "des"} <= set(printed["overall"])
    assert set(printed["targets"]) == {"G1", "G2", "G3", "G4", "G5"}
    (tmp_path / "earlier.json").write_text(json.dumps(printed))
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--baseline", str(tmp_path / "earlier.json"), "--ceiling"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "overall" in shown
    assert "ceiling" in shown
    with pytest.raises(SystemExit) as end:
        main(["score", str(pair.predicted), str(tmp_path / "nowhere.h5ad")])
    assert end.value.code == 1


@pytest.mark.parametrize("values", ["top 14.99", "top 15", "faint", "clear", "binary", "zeros", "mixed"])
def test_score_and_check_see_the_same_scale(tmp_path: Path, values: str) -> None:
    rng = np.random.default_rng(0)
    cells = rng.poisson(3.0, size=(60, 12)).astype(np.float32)
    cells[:, 0] = 5
    if values.startswith("top"):
        cells = np.log1p(cells)
        cells[7, 3] = float(values.split()[1])
    elif values in ("faint", "clear"):
        cells += np.float32(0.0005 if values == "faint" else 0.002)
    elif values == "binary":
        cells = (cells > 2).astype(np.float32)
    elif values == "zeros":
        cells[:] = 0
    else:
        cells[1::2] = np.log1p(cells[1::2])
    genes = [f"G{number}" for number in range(12)]
    labels = np.repeat(["G1", "G2", CONTROL_LABEL], 20)
    path = write_cells(tmp_path / "cells.h5ad", cells, labels, genes)
    (tmp_path / "genes.csv").write_text("\n".join(genes))
    report = check(path, season="vcc2025", genes=tmp_path / "genes.csv", rules={"num_genes": 12})
    if report.ok:
        score(path, path)
    else:
        with pytest.raises(DataError):
            score(path, path)
    assert report.ok == (values in ("top 14.99", "clear", "binary"))


def test_scoring_imports_no_torch() -> None:
    code = "import sys, pertcast.ladder.score, pertcast.cli.ladder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore")
def test_season_2026_is_scored_by_cell_eval2_context_by_context(tmp_path: Path) -> None:
    pytest.importorskip("cell_eval2")
    pair = simulate(tmp_path)
    found = score(pair.predicted, pair.real, season="vcc2026")
    assert set(found.targets) == {"G1", "G2", "G3", "G4", "G5"}
    assert "pds_cosine" in found.overall
    sides = []
    for path in (pair.predicted, pair.real):
        parts = [ad.read_h5ad(path) for _ in "AB"]
        for part, context in zip(parts, "AB", strict=True):
            part.obs["context"] = context
        joined = ad.concat(parts, index_unique="-")
        joined.write_h5ad(tmp_path / f"two_{path.name}")
        sides.append(tmp_path / f"two_{path.name}")
    both: Score = score(*sides, season="vcc2026")
    assert both.targets["B/G2"] == found.targets["G2"]
    assert both.overall == pytest.approx(found.overall)
    with pytest.raises(DataError, match="expected contexts A, B"):
        score(pair.predicted, sides[1], season="vcc2026")
    with pytest.raises(ConfigError, match="season vcc2025"):
        score(pair.predicted, pair.real, season="vcc2026", ceiling=True)


@pytest.mark.filterwarnings("ignore")
def test_a_metric_of_one_context_only_is_named_and_averaged_over_those_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell_eval2 = pytest.importorskip("cell_eval2")
    pair = simulate(tmp_path)
    paths = []
    for path in (pair.predicted, pair.real):
        parts = [ad.read_h5ad(path) for _ in "AB"]
        for part, context in zip(parts, "AB", strict=True):
            part.obs["context"] = context
        ad.concat(parts, index_unique="-").write_h5ad(tmp_path / f"two_{path.name}")
        paths.append(tmp_path / f"two_{path.name}")
    alone = score(pair.predicted, pair.real, season="vcc2026")
    real_aggregate, calls = cell_eval2.aggregate_metrics, []

    def drop_one(table: Any) -> Any:
        calls.append(1)
        rows = real_aggregate(table)
        return rows.filter(rows["metric"] != "pds_cosine") if len(calls) == dropped else rows

    monkeypatch.setattr(cell_eval2, "aggregate_metrics", drop_one)
    for dropped in (1, 2):
        calls.clear()
        found = score(*paths, season="vcc2026")
        assert found.overall == pytest.approx(alone.overall)
        lost, kept = ("A", "B") if dropped == 1 else ("B", "A")
        assert found.notes == (f"pds_cosine is missing in context {lost}: its mean is over {kept}",)


def test_season_2026_without_its_scorer_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cell_eval2", None)
    assert official
    with pytest.raises(ConfigError, match=r"pip install 'pertcast\[score\]'"):
        score(tmp_path / "a.h5ad", tmp_path / "b.h5ad", season="vcc2026")
