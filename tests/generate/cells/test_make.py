"""Every way to make cells, on both scales, with controls copied and predicted: each ends in a valid prediction."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import write_small_h5ad
from pertcast.config import load_experiment
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError
from pertcast.files.artefacts import hash_file, read_manifest
from pertcast.generate import Part, generate
from pertcast.generate.cells import CellMaker
from pertcast.pipeline import Outcome, run_experiment
from pertcast.submission.assemble import assemble
from pertcast.submission.check import CheckReport, check
from training_bench import Watcher
from workspace import Workspace, make_workspace

RULES = {"num_genes": 20, "num_targets": 3, "max_cells": 120}
MAKERS = ("model", "donors", "negative_binomial", "shift", "sparse")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("cells") / "w")


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Outcome:
    return run_experiment(workspace.experiment, workspace.out)


def made(workspace: Workspace, trained: Outcome, *overrides: str) -> tuple[ad.AnnData, CheckReport]:
    folder = workspace.folder / "-".join(overrides).replace("/", "_")
    experiment = load_experiment(workspace.experiment, overrides)
    generate(trained.run, folder / "parts", experiment=experiment)
    path = assemble(folder / "parts", folder / "prediction.h5ad")
    report = check(path, season="vcc2025", genes=workspace.genes, targets=workspace.targets, rules=RULES)
    return ad.read_h5ad(path), report


@pytest.mark.parametrize("controls", ["copied", "predicted"])
@pytest.mark.parametrize("scale", ["log1p", "counts"])
@pytest.mark.parametrize("cells", MAKERS)
def test_every_way_is_valid_on_both_scales_with_controls_copied_or_predicted(
    workspace: Workspace, trained: Outcome, cells: str, scale: str, controls: str
) -> None:
    prediction, report = made(
        workspace, trained, f"generate.cells={cells}", f"generate.scale={scale}", f"submission.controls={controls}"
    )
    assert report.ok
    assert report.facts["scale"] == scale
    assert prediction.obs["target_gene"].value_counts().to_dict() == {"G1": 29, "G2": 40, "G3": 44, "non-targeting": 6}
    values = prediction.X.toarray()
    assert values.dtype == np.float32
    if scale == "counts":
        assert (values == np.rint(values)).all()
        depth = np.median(values[(prediction.obs["target_gene"] == "G3").to_numpy()].sum(axis=1))
        assert depth == pytest.approx(500, rel=0.02)


def test_copied_controls_are_the_counts_of_real_cells(workspace: Workspace, trained: Outcome) -> None:
    prediction, _ = made(workspace, trained, "generate.scale=counts", "submission.num_controls=8")
    raw = ad.read_h5ad(workspace.data)
    real = {tuple(row) for row in raw[raw.obs["target_gene"] == "non-targeting"].X.toarray()}
    copied = prediction[prediction.obs["target_gene"] == "non-targeting"].X.toarray()
    assert len(copied) == 8
    assert {tuple(row) for row in copied} <= real


@pytest.mark.parametrize("cells", ["donors", "negative_binomial"])
def test_cells_have_the_mean_that_the_model_predicts(workspace: Workspace, trained: Outcome, cells: str) -> None:
    plain = "target_gene,n_cells\nG1,36\nG2,36\nG3,36\n"
    targets = workspace.folder / "plain.csv"
    targets.write_text(plain)
    asked = f"submission.targets={targets}"
    predicted, _ = made(workspace, trained, asked)
    drawn, _ = made(workspace, trained, asked, f"generate.cells={cells}")
    for target in ("G1", "G2", "G3"):
        wanted, found = (part[part.obs["target_gene"] == target].X.toarray() for part in (predicted, drawn))
        # the scale of all genes together is a cell's total, which log1p normalises away
        error = found.std(axis=0) / np.sqrt(len(found))
        difference = found.mean(axis=0) - wanted.mean(axis=0)
        assert (np.abs(difference - difference.mean()) < 3 * error + 0.02).all()


@pytest.mark.parametrize("cells", MAKERS)
def test_a_target_gets_the_same_counts_whatever_else_is_asked_for(
    workspace: Workspace, trained: Outcome, cells: str
) -> None:
    overrides = ["generate.scale=counts", f"generate.cells={cells}"]
    targets = workspace.folder / f"alone-{cells}.csv"
    targets.write_text("target_gene,n_cells,median_umi_per_cell\nG2,40,500\n")
    alone, together = workspace.folder / f"alone-{cells}", workspace.folder / f"together-{cells}"
    generate(trained.run, together, overrides=overrides)
    generate(trained.run, alone, overrides=[*overrides, f"submission.targets={targets}"])
    assert hash_file(alone / "H1" / "G2.h5ad") == hash_file(together / "H1" / "G2.h5ad")


def test_without_an_effect_donors_stay_as_they_are(workspace: Workspace, trained: Outcome) -> None:
    store = Store.open(trained.store)
    config = load_experiment(workspace.experiment, ["generate.scale=counts", "generate.cells=donors"]).generate
    rows = store.rows(split=Split.TRAIN, pert=store.control_code)
    part = Part("x", "small", "H1", "G1", len(rows))
    blocks = CellMaker(store, config).made(part, rows, iter([store.log1p(rows)]), pool=rows)
    assert (np.vstack([block.toarray() for block in blocks]) == store.counts(rows).toarray()).all()


@pytest.mark.parametrize("cells", ["model", "donors"])
def test_predicted_cells_are_let_go_of_before_the_next_are_waited_for(
    workspace: Workspace, trained: Outcome, cells: str
) -> None:
    store = Store.open(trained.store)
    config = load_experiment(workspace.experiment, ["generate.scale=counts", f"generate.cells={cells}"]).generate
    rows = store.rows(split=Split.TRAIN, pert=store.control_code)

    def predicted() -> Iterator[NDArray[np.float32]]:
        for some in np.array_split(rows, 3):
            cells_CG = store.log1p(some)
            held = weakref.ref(cells_CG)
            yield cells_CG
            del cells_CG
            assert held() is None

    blocks = CellMaker(store, config).made(Part("x", "small", "H1", "G1", len(rows)), rows, predicted(), pool=rows)
    assert sum(block.shape[0] for block in blocks) == len(rows)


def test_counts_need_a_store_of_counts(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    write_small_h5ad(workspace.data, scale="log1p")
    with pytest.raises(ConfigError, match="give raw counts, or choose others"):
        run_experiment(workspace.experiment, workspace.out, overrides=["train.steps=2", "generate.scale=counts"])


def test_the_scale_is_one_that_the_season_takes(workspace: Workspace, trained: Outcome) -> None:
    with pytest.raises(ConfigError, match=r"takes counts, got 'log1p'.*generate.scale=counts"):
        generate(trained.run, workspace.folder / "none", overrides=["submission.season=vcc2026"])


def test_spread_goes_with_a_shift_alone(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"residual_scale.*goes with"):
        load_experiment(workspace.experiment, ["generate.residual_scale=0.5"])


def test_centred_effects_leave_the_control_condition_as_it_is(workspace: Workspace, trained: Outcome) -> None:
    overrides = ("generate.cells=donors", "generate.subtract_control_prediction=true", "generate.scale=counts")
    prediction, report = made(workspace, trained, *overrides, "submission.controls=predicted")
    assert report.ok
    store = Store.open(trained.store)
    real = {tuple(row) for row in store.counts(store.rows(split=Split.TRAIN, pert=store.control_code)).toarray()}
    null = prediction[prediction.obs["target_gene"] == "non-targeting"].X.toarray()
    assert {tuple(row) for row in null} <= real
    with pytest.raises(ConfigError, match="use only one of the two"):
        load_experiment(workspace.experiment, ["generate.subtract_control_prediction=true", "generate.calibrated=true"])


@pytest.mark.parametrize(("scale", "chosen"), [("counts", "donors"), ("log1p", "sparse")])
def test_cells_are_made_in_the_best_way_that_the_store_allows(tmp_path: Path, scale: str, chosen: str) -> None:
    workspace = make_workspace(tmp_path / "w")
    write_small_h5ad(workspace.data, scale=scale)
    text = workspace.experiment.read_text()
    assert 'cells = "model"\n' in text
    workspace.experiment.write_text(text.replace('cells = "model"\n', ""))
    watcher = Watcher()
    outcome = run_experiment(workspace.experiment, workspace.out, overrides=["model.kind=mean"], progress=watcher)
    assert any(note.startswith(f'generate.cells = "auto": {chosen}') for note in watcher.notes)
    assert read_manifest(outcome.parts).config["generate"]["cells"] == chosen
    part = next(outcome.parts.glob("*/G1.h5ad"))
    assert read_manifest(part).config["cells"] == chosen
    named = run_experiment(
        workspace.experiment, tmp_path / "named", overrides=["model.kind=mean", f"generate.cells={chosen}"]
    )
    assert hash_file(named.prediction) == hash_file(outcome.prediction)
