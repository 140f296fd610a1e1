"""A cell belongs to its own experiment: datasets, files and panels that differ by technique do not mix.

Two screens of one cell line whose base profiles differ, as those of two technologies do. Whatever is learnt or made
must be what each screen gives alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pertcast.config import Experiment, load_experiment
from pertcast.data.cell_sets import CellSets, training_sets
from pertcast.data.counts_fit import batch_effects
from pertcast.data.de_labels import de_labels
from pertcast.data.features import load_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError, DataError
from pertcast.files.artefacts import read_manifest
from pertcast.generate import generate
from pertcast.models.baselines import BaselineKind, Examples, fit_baseline, predict_effects
from pertcast.pipeline import run_experiment
from pertcast.progress import SILENT
from pertcast.submission.check.realism import realism
from pertcast.train import train
from pertcast.train.loss_targets import training_targets
from pertcast.train.training_effects import TrainingEffects, training_effects

CONTROL = "non-targeting"
GENES = tuple(f"G{number}" for number in range(40))


def write_screen(
    path: Path,
    *,
    seed: int,
    perts: tuple[str, ...],
    fold: float = 1.0,
    context: str = "K562",
    genes: tuple[str, ...] = GENES,
    cells: int = 60,
    controls: int = 240,
) -> Path:
    """Write counts of one screen: `seed` decides its base profile; a perturbation changes G5 to G9 by `fold`."""
    rng = np.random.default_rng(seed)
    base = np.exp(rng.normal(0, 1, len(GENES)))
    labels = [CONTROL] * controls + [pert for pert in perts for _ in range(cells)]
    rates = np.tile(base / base.sum(), (len(labels), 1))
    rates[controls:, 5:10] *= fold
    counts = rng.poisson(rates * 2000)[:, [GENES.index(gene) for gene in genes]].astype(np.float32)
    obs = pd.DataFrame({"target_gene": labels, "batch": [f"b{row % 2}" for row in range(len(labels))]})
    obs["cell_type"] = context
    obs.index = [f"c{row}" for row in range(len(labels))]
    ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(genes))).write_h5ad(path)
    return path


def make_store(folder: Path, datasets: dict[str, Path], **sections: Any) -> Store:
    experiment = Experiment.model_validate(
        {
            "datasets": {name: str(path) for name, path in datasets.items()},
            "training": dict.fromkeys(datasets, "train"),
            "columns": {"cell_type": "cell_type", "batch": "batch"},
            "prepare": {"target_sum": 2000.0},
            **sections,
        }
    )
    return Store.open(prepare(experiment, folder))


def two_datasets(tmp_path: Path, *, fold: float = 1.0) -> dict[str, Path]:
    return {
        "a": write_screen(tmp_path / "a.h5ad", seed=1, perts=("G1", "G2"), fold=fold),
        "b": write_screen(tmp_path / "b.h5ad", seed=2, perts=("G1", "G3"), fold=fold),
    }


def effects_of(store: Store) -> TrainingEffects:
    return training_effects(store, np.arange(len(store.genes)), progress=SILENT)


def effect_of(store: Store, pert: str, effects: TrainingEffects | None = None) -> np.ndarray:
    effects = effects_of(store) if effects is None else effects
    effect_G: np.ndarray = effects.effects_NG[effects.row_of()[0, store.perts.index(pert)]]
    return effect_G


def sets_of(store: Store, match: Any = "batch") -> CellSets:
    return training_sets(store, set_size=8, seed=0, epoch=0, split=Split.TRAIN, match=match, control_sets=True)


@pytest.mark.parametrize("match", ["batch", "context", "all_datasets"])
def test_no_pair_and_no_set_crosses_datasets(tmp_path: Path, match: str) -> None:
    store = make_store(tmp_path / "store", two_datasets(tmp_path))
    sets = sets_of(store, match)
    datasets = store.dataset_codes[sets.pert_rows]
    np.testing.assert_array_equal(datasets, store.dataset_codes[sets.control_rows])
    assert (datasets == datasets[:, :1]).all()
    assert set(datasets.ravel().tolist()) == {0, 1}


def test_effects_of_a_technique_alone_are_those_of_each_dataset(tmp_path: Path) -> None:
    """Two datasets that differ by technique, with no true effect: what is left is noise, as with own controls."""
    paths = two_datasets(tmp_path)
    store = make_store(tmp_path / "both", paths)
    alone = {name: make_store(tmp_path / name, {name: path}) for name, path in paths.items()}
    measured = np.mean([np.abs(effect_of(store, pert)).mean() for pert in ("G2", "G3")])
    expected = np.mean([np.abs(effect_of(alone[name], pert)).mean() for name, pert in (("a", "G2"), ("b", "G3"))])
    assert measured == pytest.approx(expected, rel=0.1)
    both = [effect_of(alone[name], "G1") for name in "ab"]
    sizes = [len(one.rows(split=Split.TRAIN, pert=one.perts.index("G1"))) for one in alone.values()]
    np.testing.assert_allclose(effect_of(store, "G1"), np.average(both, axis=0, weights=sizes), atol=0.02)
    # pooled controls would give an effect of the technique, several times as large
    pooled = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code)).mean(0)
    wrong = store.log1p(store.rows(split=Split.TRAIN, pert=store.perts.index("G2"))).mean(0) - pooled
    assert np.abs(wrong).mean() > 3 * measured


def test_de_labels_do_not_call_the_technique(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", two_datasets(tmp_path))
    labels = de_labels(store)
    assert labels.significant.sum() <= 3
    changed = make_store(tmp_path / "changed", two_datasets(tmp_path, fold=2.0))
    found = de_labels(changed)
    assert len(found.pert) == 3
    assert found.significant[:, 5:10].all()


def test_labels_of_two_screens_are_stouffers_of_their_tests(tmp_path: Path) -> None:
    from scipy.stats import combine_pvalues, false_discovery_control, mannwhitneyu

    store = make_store(tmp_path / "store", two_datasets(tmp_path, fold=1.2))
    p_values, weights = [], []
    for screen in range(2):
        cells, controls = (
            store.log1p(store.screen_rows(screen, split=Split.TRAIN, pert=pert)).astype(np.float32)
            for pert in (store.perts.index("G1"), store.control_code)
        )
        # one-sided, so that opposite changes cancel
        p_values.append(mannwhitneyu(cells, controls, alternative="greater", axis=0, use_continuity=False).pvalue)
        weights.append(np.sqrt(len(cells)))
    above = [combine_pvalues(pair, method="stouffer", weights=weights).pvalue for pair in zip(*p_values, strict=True)]
    two_sided = 2 * np.minimum(above, 1 - np.array(above))
    expected = false_discovery_control(two_sided) < 0.05
    labels = de_labels(store)
    row = int(labels.find(np.array([0]), np.array([store.perts.index("G1")]))[0])
    assert expected.sum() > 3
    assert (labels.significant[row] != expected).sum() <= 1  # the continuity correction may decide a close one


def test_two_files_with_equal_batch_names_have_two_batches(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_screen(folder / "one.h5ad", seed=1, perts=("G1",))
    write_screen(folder / "two.h5ad", seed=2, perts=("G1", "G2"))
    store = make_store(tmp_path / "store", {"d": folder})
    assert store.batches == ("d/one.h5ad.b0", "d/one.h5ad.b1", "d/two.h5ad.b0", "d/two.h5ad.b1")
    sets = sets_of(store)
    for name in ("file_codes", "batch_codes"):
        codes = getattr(store, name)
        np.testing.assert_array_equal(codes[sets.pert_rows], codes[sets.control_rows])
    assert (store.file_codes[sets.pert_rows] == store.file_codes[sets.pert_rows][:, :1]).all()


def test_a_file_without_controls_takes_those_of_its_dataset_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_screen(folder / "one.h5ad", seed=1, perts=("G1",))
    write_screen(folder / "two.h5ad", seed=1, perts=("G2",), controls=0)
    other = write_screen(tmp_path / "other.h5ad", seed=2, perts=("G3",))
    store = make_store(tmp_path / "store", {"d": folder, "e": other}, model={"preset": "tiny"})
    sets = sets_of(store)
    np.testing.assert_array_equal(store.dataset_codes[sets.pert_rows], store.dataset_codes[sets.control_rows])
    assert sets.num_other_file == len(store.rows(split=Split.TRAIN, pert=store.perts.index("G2")))


def test_batches_are_compared_within_one_target_of_one_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perts = ("G1", "G2", "G3", "G4", "G5")
    paths = {name: write_screen(tmp_path / f"{name}.h5ad", seed=seed, perts=perts) for seed, name in enumerate("ab")}
    store = make_store(tmp_path / "store", paths)
    seen: list[int] = []

    def count(_values: np.ndarray, _batches: np.ndarray, within: np.ndarray) -> float:
        seen.append(len(np.unique(within)))
        return 0.0

    monkeypatch.setattr("pertcast.data.counts_fit.explained_share", count)
    batch_effects(store)
    perturbed = store.pert_codes != store.control_code
    assert len({*zip(store.screen_codes[perturbed], store.pert_codes[perturbed], strict=True)}) == 10
    assert seen == [10, 10]


def test_panels_that_measured_other_genes_give_no_effect_there(tmp_path: Path) -> None:
    paths = {
        "a": write_screen(tmp_path / "a.h5ad", seed=1, perts=("G1", "G2")),
        "b": write_screen(tmp_path / "b.h5ad", seed=1, perts=("G1", "G3"), genes=GENES[:30][::-1]),
    }
    store = make_store(tmp_path / "store", paths, prepare={"missing_genes": "zero", "target_sum": 2000.0})
    assert store.measured_SG is not None
    assert store.measured_SG.sum(axis=1).tolist() == [40, 30]
    effects = effects_of(store)
    alone = make_store(tmp_path / "alone", {"b": paths["b"]}, prepare={"target_sum": 2000.0})
    g3 = effect_of(store, "G3", effects)
    assert np.isnan(g3[30:]).all()
    own = effect_of(alone, "G3")[[alone.genes.index(gene) for gene in GENES[:30]]]
    np.testing.assert_allclose(g3[:30], own, atol=1e-5)
    # a gene that one of two screens measured has that screen's effect
    only_a = make_store(tmp_path / "only", {"a": paths["a"]}, prepare={"target_sum": 2000.0})
    np.testing.assert_allclose(effect_of(store, "G1", effects)[30:], effect_of(only_a, "G1")[30:], atol=1e-5)
    labels = de_labels(store)
    assert not labels.significant[int(labels.find(np.array([0]), np.array([store.perts.index("G3")]))[0]), 30:].any()
    # moments are of the cells that measured a gene
    controls_a = store.rows(split=Split.TRAIN, dataset=0, pert=store.control_code)
    np.testing.assert_allclose(store.control_mean_log1p[30:], store.log1p(controls_a)[:, 30:].mean(0), rtol=1e-4)
    truth = training_targets(store, np.arange(40), labels=True, progress=SILENT)
    import torch

    code = store.perts.index("G3")
    known = truth.of(torch.tensor([0]), torch.tensor([code]), torch.tensor([1]))
    assert known.measured_BG is not None
    assert known.measured_BG[0].tolist() == [True] * 30 + [False] * 10
    assert not known.effect_BG[0, 30:].any()
    assert known.valid_BG is not None
    assert not known.valid_BG[0, 30:].any()


@pytest.mark.parametrize("kind", ["mean", "ridge", "kernel_ridge", "knn"])
def test_baselines_fit_each_gene_on_the_examples_that_measured_it(kind: BaselineKind) -> None:
    rng = np.random.default_rng(0)
    features, effects = rng.normal(size=(12, 4)), rng.normal(size=(12, 6))
    contexts = np.repeat([0, 1], 6)
    effects[8:, 4] = np.nan
    effects[:, 5] = np.nan
    fit = fit_baseline(kind, Examples(contexts, features, effects, 2))
    assert np.isfinite(fit.left_out_NG).all()
    predicted = predict_effects(fit.baseline, features[:1], context=0)[0]
    assert predicted[5] == 0
    chosen = fit.baseline.spec.choice
    kept = np.arange(8)
    alone = fit_baseline(kind, Examples(contexts[kept], features[kept], effects[kept][:, [4]], 2))
    if alone.baseline.spec.choice._replace(error=0.0) == chosen._replace(error=0.0) or kind == "mean":
        np.testing.assert_allclose(
            predicted[4], predict_effects(alone.baseline, features[:1], context=0)[0, 0], rtol=1e-5
        )
    whole = fit_baseline(kind, Examples(contexts, features, effects[:, :4], 2))
    if whole.baseline.spec.choice._replace(error=0.0) == chosen._replace(error=0.0) or kind == "mean":
        np.testing.assert_allclose(
            predicted[:4], predict_effects(whole.baseline, features[:1], context=0)[0], rtol=1e-5
        )


def test_a_dataset_without_controls_is_refused_unless_others_may_be_borrowed(tmp_path: Path) -> None:
    paths = {
        "a": write_screen(tmp_path / "a.h5ad", seed=1, perts=("G1",)),
        "b": write_screen(tmp_path / "b.h5ad", seed=1, perts=("G2",), controls=0),
    }
    with pytest.raises(DataError, match=r"b\.K562: no control cell") as caught:
        make_store(tmp_path / "store", paths)
    assert "all_datasets" in str(caught.value)
    store = make_store(tmp_path / "store", paths, train={"match": "all_datasets"})
    sets = sets_of(store, "all_datasets")
    assert sets.num_other_dataset == 60
    # what has no control of its own has no effect and no labels
    assert (
        {store.perts[code] for code in effects_of(store).perts}
        == {"G1"}
        == {store.perts[c] for c in de_labels(store).pert}
    )


def test_coexpression_is_within_screens(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", two_datasets(tmp_path), features={"kind": "coexpression", "num_loadings": 2})
    features = load_features(
        Experiment.model_validate(
            {"datasets": {"a": "a"}, "features": {"kind": "coexpression", "num_loadings": 2}}
        ).features,
        store,
    )
    # genes vary independently within a screen; the difference between screens would be a component of size about 1
    assert np.abs(features.matrix).max() < 0.5


EXPERIMENT = """
[datasets]
a = "a.h5ad"
b = "b.h5ad"

[training]
a = "train"
b = "train"

[columns]
cell_type = "cell_type"
batch = "batch"

[model]
kind = "mean"

[generate]
cells = "donors"

[submission]
genes = "genes.csv"
targets = "targets.csv"

[submission.rules]
num_genes = 40
num_targets = 2
max_cells = 200
"""


def write_experiment(tmp_path: Path, *, dataset: str | None) -> Path:
    two_datasets(tmp_path)
    (tmp_path / "genes.csv").write_text("".join(f"{gene}\n" for gene in GENES))
    (tmp_path / "targets.csv").write_text("target_gene,n_cells\nG2,30\nG3,30\n")
    named = "" if dataset is None else f'dataset = "{dataset}"\n'
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT.replace("[submission]\n", f"[submission]\n{named}"))
    return path


@pytest.mark.parametrize("dataset", ["a", "b"])
def test_copied_controls_and_donors_are_of_the_submissions_dataset(tmp_path: Path, dataset: str) -> None:
    outcome = run_experiment(write_experiment(tmp_path, dataset=dataset), tmp_path / "out")
    cells = ad.read_h5ad(outcome.prediction)
    raw = {name: ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in "ab"}
    profile = {
        name: np.log1p(other[(other.obs["target_gene"] == CONTROL).to_numpy()].X.toarray()).mean(0)
        for name, other in raw.items()
    }
    for label in cells.obs["target_gene"].unique():
        made = cells[(cells.obs["target_gene"] == label).to_numpy()].X.toarray().mean(0)
        distance = {name: np.abs(made - profile[name]).mean() for name in profile}
        assert min(distance, key=lambda name: distance[name]) == dataset
        assert distance[dataset] < 0.3 * max(distance.values())
    assert set(cells.obs["batch"]) <= {f"{dataset}.b0", f"{dataset}.b1"}


def test_a_context_of_two_datasets_wants_a_name(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, dataset=None)
    experiment = load_experiment(path)
    store = prepare(experiment, tmp_path / "store")
    run = train(experiment, store, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"2 datasets have control cells of 'K562': 'a', 'b'") as caught:
        generate(run, tmp_path / "parts")
    assert "--set submission.dataset=a" in str(caught.value)
    with pytest.raises(ConfigError, match="no such dataset: 'c'"):
        load_experiment(path, ["submission.dataset=c"])


def test_real_cells_of_several_contexts_are_taken_of_the_predictions_own(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, dataset="a")
    outcome = run_experiment(path, tmp_path / "out", overrides=["submission.context=K562"])
    other = write_screen(tmp_path / "other.h5ad", seed=7, perts=("G2",), context="RPE1")
    both = ad.concat([ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_h5ad(other)], index_unique="-")
    both.write_h5ad(tmp_path / "both.h5ad")
    rules = load_experiment(path).submission.rules
    alone = realism(outcome.prediction, tmp_path / "a.h5ad", season="vcc2025", rules=rules)
    found = realism(outcome.prediction, tmp_path / "both.h5ad", season="vcc2025", rules=rules)
    assert found.contexts == alone.contexts
    assert any("'K562' in 'cell_type'" in note for note in found.notes)
    wrong = realism(
        outcome.prediction, tmp_path / "both.h5ad", season="vcc2025", rules=rules, where={"cell_type": "RPE1"}
    )
    assert wrong.contexts != alone.contexts
    with pytest.raises(DataError, match="no cell has 'RPE'"):
        realism(outcome.prediction, tmp_path / "both.h5ad", season="vcc2025", rules=rules, where={"cell_type": "RPE"})


@pytest.mark.parametrize(
    "more",
    [
        ("loss.mae=1", "loss.de=0.5", "loss.rank=0.5", "loss.nb=0.1", "train.select_by=pds"),
        ("loss.mae=1", "loss.de=0.5", "loss.de_head=learned"),
        ("model.residual=shift", "model.base=ridge", "loss.mae=1", "train.select_by=overall"),
        ("model.input=hvg", "model.output=hvg", "generate.unpredicted_genes=control", "loss.rank=1"),
        ("model.batch_embedding=true", "model.context_embedding=true"),
    ],
)
def test_every_loss_trains_on_two_panels_and_predicts_no_effect_of_what_was_not_measured(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    path = write_experiment(tmp_path, dataset="b")
    write_screen(tmp_path / "b.h5ad", seed=2, perts=("G1", "G3", "G4"), genes=GENES[:30])
    text = path.read_text().replace(
        'kind = "mean"', 'preset = "tiny"\nset_size = 8\nhidden = 16\nfeedforward = 32\nheads = 2'
    )
    path.write_text(text + '\n[prepare]\nmissing_genes = "zero"\nnum_hvgs = 20\n[features]\nmissing = "mean"\n')
    few = ("train.steps=4", "train.val_every=2", "train.precision=fp32", 'fewshot."b.K562".val=["G4"]')
    outcome = run_experiment(path, tmp_path / "out", overrides=[*few, *more])
    assert outcome.report.ok
    cells = ad.read_h5ad(outcome.prediction)
    # real control cells of this panel show none of these genes, and no effect adds any
    assert cells[:, 30:].X.sum() == 0
    assert cells[:, :30].X.sum() > 0
    assert any("10 genes that b did not measure are 0" in note for note in read_manifest(outcome.parts).notes)
