"""The counts head: its likelihood, what it learns, and the cells that are drawn from it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from unittest import mock

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import sparse, stats

from conftest import write_small_h5ad
from pertcast.arc.import_export import export_run
from pertcast.config import load_experiment
from pertcast.data.features import open_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError
from pertcast.files.scales import normalise_log1p
from pertcast.generate import generate
from pertcast.generate.cells import draw_counts
from pertcast.ladder.calibration import calibrate
from pertcast.models.heads import CountsHead
from pertcast.models.losses import negative_binomial_loss
from pertcast.models.run_folder import Run, open_run
from pertcast.models.state import StateTransition
from pertcast.pipeline import Outcome, run_experiment
from pertcast.progress import SILENT
from pertcast.stats.counts import fit_counts
from pertcast.stats.draws import uniform_key
from pertcast.stats.realism import Reference, compare_cells
from pertcast.submission.assemble import assemble
from pertcast.submission.check import check
from pertcast.train import train
from pertcast.train.batches import SetReader
from pertcast.train.control_counts import control_rates
from small_networks import inputs, tiny_spec
from workspace import Workspace, make_workspace

RULES = {"num_genes": 20, "num_targets": 3, "max_cells": 120}
LEARNS = ("loss.nb=30", "loss.warmup_steps=0", "train.steps=300", "train.learning_rate=1e-2", "train.val_every=50")


def some_counts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    mean, shape = np.exp(random.normal(size=(2, 5, 7))), np.exp(random.normal(size=7))
    counts = random.poisson(mean * random.gamma(shape, 1 / shape, size=mean.shape))
    return torch.from_numpy(counts).double(), torch.from_numpy(np.log(mean)), torch.from_numpy(np.log(shape))


def test_the_loss_is_the_likelihood_of_scipy_and_of_torch() -> None:
    counts, log_mean, log_shape = some_counts()
    found = negative_binomial_loss(counts, log_mean, log_shape)
    mean, shape = log_mean.exp(), log_shape.exp()
    for one in range(2):
        total = 0.0
        for cell in range(5):
            for gene in range(7):
                size, average = shape[gene].item(), mean[one, cell, gene].item()
                total -= stats.nbinom.logpmf(counts[one, cell, gene].item(), size, size / (size + average))
        assert found[one].item() == pytest.approx(total / 35, rel=1e-9)
    theirs = torch.distributions.NegativeBinomial(shape, logits=log_mean - log_shape)
    likelihood = theirs.log_prob(counts)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, -likelihood.mean((1, 2)))
    low = negative_binomial_loss(counts.float(), log_mean.float(), log_shape.float())
    torch.testing.assert_close(low, found.float())


def test_the_gradient_of_the_loss_is_that_of_differences() -> None:
    counts, log_mean, log_shape = some_counts()
    given = log_mean.requires_grad_(), log_shape.requires_grad_()
    assert torch.autograd.gradcheck(lambda *values: negative_binomial_loss(counts, *values), given)
    far = negative_binomial_loss(1e4 * torch.ones(1, 1, 1), torch.full((1, 1, 1), -20.0), torch.full((1,), 5.0))
    assert torch.isfinite(far).all()


def test_the_head_starts_at_the_control_cells_and_changes_no_prediction() -> None:
    head = CountsHead(4, 3)
    head.start(torch.tensor([0.0, 1.0, 99.0]))
    found = head(torch.randn(2, 4))
    assert not found.log_fold_BG.any()
    assert found.log_shape_G.tolist() == [0, 1, 5]
    spec = tiny_spec()
    model = StateTransition(spec).eval()
    control, pert, _, _ = inputs(spec)
    without = model(control, pert)
    assert without.counts is None
    model.add_counts_head(torch.zeros(spec.num_genes))
    within = model(control, pert)
    assert torch.equal(within.log1p_BSG, without.log1p_BSG)
    assert within.counts is not None
    assert within.counts.log_fold_BG.shape == (2, spec.num_genes)


def test_drawn_counts_have_the_rates_the_dispersion_and_the_totals_asked_for() -> None:
    random = np.random.default_rng(1)
    share = random.dirichlet(np.full(40, 0.5), size=2)
    fold, shape = random.normal(size=40), np.exp(random.normal(1, 0.5, size=40))
    batch, sizes = np.repeat([0, 1], 4000), np.tile([500.0, 2000.0], 4000)
    made = draw_counts(share, fold, shape, batch=batch, sizes=sizes, key=uniform_key(0, "draw")).toarray()
    assert (made == np.rint(made)).all()
    rates = share * np.exp(fold)
    rates /= rates.sum(axis=1, keepdims=True)
    for code in (0, 1):
        for size in (500.0, 2000.0):
            mean, cells = size * rates[code], made[(batch == code) & (sizes == size)]
            variance = mean + mean**2 / shape
            assert (np.abs(cells.mean(axis=0) - mean) < 4.5 * np.sqrt(variance / len(cells)) + 0.01).all()
            often = mean > 1
            assert np.median(cells.var(axis=0)[often] / variance[often]) == pytest.approx(1, abs=0.1)
    key = uniform_key(0, "draw")
    tail = draw_counts(share, fold, shape, batch=batch[10:20], sizes=sizes[10:20], key=key, first_cell=10)
    assert (tail.toarray() == made[10:20]).all()


def test_without_an_effect_drawn_cells_of_h1_are_like_other_real_cells() -> None:
    cells = ad.read_h5ad(Path(str(resources.files("pertcast"))) / "assets" / "h1_vcc2025.h5ad")
    counts = sparse.csr_matrix(cells.X, dtype=np.float32)
    order = np.random.default_rng(0).permutation(counts.shape[0])
    ours, theirs = counts[order[:300]], counts[order[300:]]
    sizes = np.asarray(ours.sum(axis=1, dtype=np.float64)).ravel()
    target_sum = float(np.median(sizes))
    batch = np.zeros(300, dtype=np.int64)
    fit = fit_counts([(ours, batch)], num_batches=1)
    made = draw_counts(fit.share, np.zeros(1000), fit.shape, batch=batch, sizes=sizes, key=uniform_key(0, "h1"))
    reference = Reference(normalise_log1p(theirs, np.asarray(theirs.sum(axis=1)).ravel(), target_sum))
    found = compare_cells(normalise_log1p(made, np.asarray(made.sum(axis=1)).ravel(), target_sum), reference)
    assert found.de_calls <= 5
    assert 0.8 <= found.variance_ratio[1] <= 1.1


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("counts_head") / "w")


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Outcome:
    return run_experiment(workspace.experiment, workspace.out, overrides=[*LEARNS, "generate.cells=nb_head"])


def test_counts_come_back_out_of_the_cells_that_training_reads(workspace: Workspace, trained: Outcome) -> None:
    store = Store.open(trained.store)
    reader = SetReader(store, load_experiment(workspace.experiment), open_features(trained.run / "features"))
    sets = reader.training(0)
    batch = reader.read(sets)
    assert batch.depth_BS is not None
    found = (batch.real_BSO.expm1() * batch.depth_BS[..., None]).round()
    real = store.counts(sets.pert_rows.reshape(-1)).toarray().reshape(found.shape)
    np.testing.assert_array_equal(found.numpy(), real)


def test_rates_are_those_of_training_control_cells_alone(trained: Outcome) -> None:
    store = Store.open(trained.store)
    found = control_rates(store, np.arange(20))
    cells = store.counts(store.rows(split=Split.TRAIN, pert=store.control_code)).toarray()
    np.testing.assert_allclose(np.exp(found.log_rate_SG[0]), cells.sum(0) / cells.sum() * store.target_sum, rtol=0.01)


def folds_of(run: Run, target: str) -> np.ndarray:
    store = Store.open(run.store_path)
    rows = store.rows(split=Split.TRAIN, pert=store.control_code)[:8]
    feature = torch.from_numpy(open_features(run.path / "features").of([target]))
    with torch.no_grad():
        counts = run.model(counts_head=True)(torch.from_numpy(store.log1p(rows))[None], feature).counts
    assert counts is not None
    return np.asarray(counts.log_fold_BG[0])


def test_the_head_learns_which_gene_a_target_loses(trained: Outcome) -> None:
    run = open_run(trained.run)
    for target in ("G1", "G2", "G3"):
        folds = folds_of(run, target)
        assert run.genes[int(folds.argmin())] == target
        assert folds.min() < -0.4
        assert np.abs(np.delete(folds, folds.argmin())).mean() < 0.3
    assert np.abs(folds_of(run, run.control)).max() < 0.6


@pytest.mark.parametrize("scale", ["log1p", "counts"])
def test_a_run_with_a_head_makes_valid_predictions(workspace: Workspace, trained: Outcome, scale: str) -> None:
    folder = workspace.folder / scale
    asked = [f"generate.scale={scale}", "submission.controls=predicted"]
    generate(trained.run, folder / "parts", overrides=asked)
    path = assemble(folder / "parts", folder / "prediction.h5ad")
    report = check(path, season="vcc2025", genes=workspace.genes, targets=workspace.targets, rules=RULES)
    assert report.ok
    assert report.facts["scale"] == scale
    if scale == "counts":
        cells = ad.read_h5ad(path)
        depths = np.asarray(cells[(cells.obs["target_gene"] == "G3").to_numpy()].X.sum(axis=1))
        assert np.median(depths) == pytest.approx(500, rel=0.03)
        totals = {name: cells[(cells.obs["target_gene"] == name).to_numpy()].X.toarray() for name in ("G1", "G2")}
        shares = {name: values.sum(0) / values.sum() for name, values in totals.items()}
        column = list(cells.var_names).index("G1")
        assert shares["G1"][column] < 0.5 * shares["G2"][column]


def test_the_whole_pipeline_ends_in_a_valid_archive(trained: Outcome) -> None:
    assert trained.archive.is_file()


def test_nobody_else_needs_the_head_and_an_export_says_that_it_is_left_out(trained: Outcome, tmp_path: Path) -> None:
    names = {name for name in load_file(trained.run / "weights.safetensors") if name.startswith("counts_head.")}
    assert len(names) == 5
    run = open_run(trained.run)
    assert not names & run.model().state_dict().keys()
    said: list[str] = []
    with mock.patch.object(type(SILENT), "note", lambda _, text: said.append(text)):
        export_run(trained.run, tmp_path / "arc")
    assert any("counts head is left out" in note for note in said)


def test_what_does_not_go_with_the_head_is_refused(workspace: Workspace, trained: Outcome, tmp_path: Path) -> None:
    experiment = load_experiment(workspace.experiment, ["train.steps=2"])
    plain = train(experiment, trained.store, tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"train one with loss\.nb above 0"):
        generate(plain, tmp_path / "parts", overrides=["generate.cells=nb_head"])
    with pytest.raises(ConfigError, match="draws counts"):
        load_experiment(workspace.experiment, ["generate.cells=nb_head", "generate.subtract_control_prediction=true"])
    with pytest.raises(ConfigError, match="calibrate another way"):
        calibrate(trained.run)
    with pytest.raises(ConfigError, match="every term is switched off"):
        train(load_experiment(workspace.experiment, ["loss.energy=0", "loss.nb=1"]), trained.store, tmp_path / "alone")
    write_small_h5ad(tmp_path / "log1p.h5ad", scale="log1p")
    text = workspace.experiment.read_text().replace('"data"', f'"{tmp_path / "log1p.h5ad"}"').replace('"genes.csv"', "")
    (tmp_path / "log1p.toml").write_text(text.partition("[submission]")[0])
    logged = load_experiment(tmp_path / "log1p.toml", ["loss.nb=1"])
    with pytest.raises(ConfigError, match="made of log1p values"):
        train(logged, prepare(logged, tmp_path / "store"), tmp_path / "run")
