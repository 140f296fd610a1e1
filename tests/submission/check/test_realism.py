"""What is said of how real cells look: real cells pass, cells that everyone's first script makes do not."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import sparse, stats

from pertcast.cli.app import main
from pertcast.errors import DataError
from pertcast.stats.realism import Reference, compare_cells
from pertcast.submission.check.realism import RealismReport, realism

NUM_GENES = 200
GENES = [f"G{number}" for number in range(NUM_GENES)]
RULES = {"num_genes": NUM_GENES, "num_targets": 2}
Counts = NDArray[np.float32]


def draw(number: int, seed: int, *, umi: float = 2000.0) -> Counts:
    random = np.random.default_rng(seed)
    share = np.exp(1.6 * np.random.default_rng(0).normal(size=NUM_GENES))
    program = np.exp(0.3 * random.normal(size=(number, 1)) * (np.arange(NUM_GENES) % 4 == 0))
    rates = umi * np.exp(0.2 * random.normal(size=(number, 1))) * share / share.sum() * program
    return np.asarray(random.poisson(rates * random.gamma(8, 1 / 8, size=rates.shape)), dtype=np.float32)


def log1p(counts: Counts, target_sum: float = 2000.0) -> Counts:
    return np.asarray(np.log1p(counts / counts.sum(1, keepdims=True) * target_sum), dtype=np.float32)


def write(path: Path, values: Counts, labels: list[str], *, genes: list[str] = GENES, **columns: list[str]) -> Path:
    obs = pd.DataFrame({"target_gene": labels, **columns}, index=[f"c{row}" for row in range(len(labels))])
    ad.AnnData(sparse.csr_matrix(values), obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path)
    return path


@pytest.fixture
def controls(tmp_path: Path) -> Path:
    return write(tmp_path / "controls.h5ad", draw(600, 1), ["non-targeting"] * 600)


def predicted(folder: Path, null: Counts, *, name: str = "prediction.h5ad") -> Path:
    targets = np.vstack([draw(60, 2), draw(60, 3)])
    values = np.vstack([null, log1p(targets) if (null != np.rint(null)).any() else targets])
    return write(folder / name, values, ["non-targeting"] * len(null) + ["G1"] * 60 + ["G2"] * 60)


def holds(report: RealismReport) -> list[bool]:
    return [ok for _, ok, _ in report.contexts[0].verdicts]


@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_real_cells_pass_on_both_scales(tmp_path: Path, controls: Path, scale: str) -> None:
    cells = draw(250, 4)
    report = realism(predicted(tmp_path, cells if scale == "counts" else log1p(cells)), controls, season="vcc2025")
    (found,) = report.contexts
    assert (report.scale, holds(report)) == (scale, [True, True, True])
    assert found.null is not None
    assert (found.null.num_cells, found.real.num_cells) == (250, 250)
    assert found.null.variance_ratio[1] == pytest.approx(1, abs=0.06)
    assert found.null.correlation > 0.3
    assert found.targets is not None
    assert found.targets.num_cells == 120
    assert ("null" in found.totals) == (scale == "counts")
    assert found.totals["real"][1] == pytest.approx(2000, rel=0.1)


def test_a_shift_of_every_value_and_copies_of_the_mean_are_found_out(tmp_path: Path, controls: Path) -> None:
    cells = log1p(draw(250, 4))
    moved = realism(predicted(tmp_path, cells + np.float32(0.02)), controls, season="vcc2025")
    assert holds(moved) == [False, True, False]
    flat = np.tile(cells.mean(axis=0), (250, 1)) + 0.01 * cells
    assert holds(realism(predicted(tmp_path, flat), controls, season="vcc2025")) == [False, False, False]


def test_numbers_are_those_of_slow_ways() -> None:
    one, other = log1p(draw(80, 5)), log1p(draw(90, 6))
    found = compare_cells(sparse.csr_matrix(one), Reference(sparse.csr_matrix(other)))
    shown = (other > 0).sum(axis=0) >= 10
    ratio = one[:, shown].var(axis=0, ddof=1) / other[:, shown].var(axis=0, ddof=1)
    assert found.variance_ratio == pytest.approx(np.quantile(ratio, [0.1, 0.5, 0.9]), rel=1e-4)
    mine, theirs = (np.asarray((cells == 0).mean(axis=0)) for cells in (one, other))
    zeros = np.asarray(mine - theirs)[shown]
    assert found.zero_difference == pytest.approx([*np.quantile(zeros, [0.05, 0.5, 0.95]), zeros.mean()], abs=1e-6)
    p_values = [stats.mannwhitneyu(one[:, gene], other[:, gene]).pvalue for gene in range(NUM_GENES)]
    called = stats.false_discovery_control(np.nan_to_num(p_values, nan=1.0)) < 0.05
    assert found.de_calls == called.sum()
    top = np.argsort(-other.mean(axis=0))[:100]
    upper = np.triu_indices(100, 1)
    mine, theirs = (np.asarray(np.corrcoef(cells[:, top].T))[upper] for cells in (one, other))
    assert found.correlation == pytest.approx(np.corrcoef(mine, theirs)[0, 1], abs=1e-4)


def test_genes_may_lie_in_another_order_and_the_real_side_in_log1p(tmp_path: Path, controls: Path) -> None:
    prediction = predicted(tmp_path, draw(250, 4))
    plain = realism(prediction, controls, season="vcc2025")
    order = np.random.default_rng(0).permutation(NUM_GENES)
    values = log1p(draw(600, 1), target_sum=500.0)[:, order]
    shuffled = write(tmp_path / "s.h5ad", values, ["non-targeting"] * 600, genes=[GENES[place] for place in order])
    other = realism(prediction, shuffled, season="vcc2025")
    assert other.contexts[0].real.de_calls == plain.contexts[0].real.de_calls
    assert other.contexts[0].real.zero_difference == pytest.approx(plain.contexts[0].real.zero_difference, abs=1e-6)
    few = write(tmp_path / "few.h5ad", draw(600, 1)[:, :50], ["non-targeting"] * 600, genes=GENES[:50])
    with pytest.raises(DataError, match="150 of the 200 genes"):
        realism(prediction, few, season="vcc2025")


def test_each_context_is_compared_with_its_own_controls(tmp_path: Path) -> None:
    contexts = ["A"] * 60 + ["B"] * 60
    prediction = write(tmp_path / "p.h5ad", np.vstack([draw(60, 2), draw(60, 3)]), ["G1"] * 120, context=contexts)
    real = write(tmp_path / "r.h5ad", draw(200, 1), ["non-targeting"] * 200, context=["A"] * 100 + ["B"] * 100)
    report = realism(prediction, real, season="vcc2026")
    assert [part.context for part in report.contexts] == ["A", "B"]
    assert all(part.null is None and part.verdicts == () for part in report.contexts)
    assert any("no 'non-targeting' cells of context A" in note for note in report.notes)
    only = write(tmp_path / "o.h5ad", draw(100, 1), ["non-targeting"] * 100, context=["A"] * 100)
    with pytest.raises(DataError, match="context 'B'"):
        realism(prediction, only, season="vcc2026")
    every = write(tmp_path / "e.h5ad", draw(100, 1), ["non-targeting"] * 100)
    assert "used for every context" in realism(prediction, every, season="vcc2026").notes[0]


def test_check_prints_it_and_writes_it_beside_the_prediction(
    tmp_path: Path, controls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction = predicted(tmp_path, draw(250, 4))
    (tmp_path / "genes.csv").write_text("".join(f"{gene}\n" for gene in GENES))
    rules = [part for rule in ("num_genes=200", "num_targets=2") for part in ("--rule", rule)]
    command = ["check", str(prediction), "--genes", str(tmp_path / "genes.csv"), *rules, "--against", str(controls)]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 0
    assert "✓ without an effect at most" in capsys.readouterr().out
    kept = json.loads((tmp_path / "realism.json").read_text())
    assert kept["contexts"][0]["null"]["num_cells"] == 250
    assert len(kept["contexts"][0]["verdicts"]) == 3
    with pytest.raises(SystemExit):
        main([*command, "--json"])
    assert {**json.loads(capsys.readouterr().out)["realism"], "made_by": "pertcast"} == kept
