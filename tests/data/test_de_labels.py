"""DE labels of the training split: SciPy's statistics, kept in the store, and blind to what is held out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import false_discovery_control, mannwhitneyu

import pertcast.data.de_labels
from pertcast.config import Experiment
from pertcast.data.de_labels import LABELS_FILE, DeLabels, de_labels
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store

Builder = Callable[..., Path]


def make_store(path: Path, out: Path, **sections: Any) -> Store:
    sections.setdefault("columns", {"cell_type": "cell_type", "batch": "batch"})
    given = {"datasets": {"d": str(path)}, "training": {"d": "train"}, "prepare": {"num_hvgs": 6}, **sections}
    return Store.open(prepare(Experiment.model_validate(given, strict=False), out))


def labels_by_scipy(store: Store, context: int, pert: int) -> NDArray[np.bool_]:
    ours = store.log1p(store.rows(split=Split.TRAIN, context=context, pert=pert)).astype(np.float64)
    theirs = store.log1p(store.rows(split=Split.TRAIN, context=context, pert=store.control_code)).astype(np.float64)
    p_value = mannwhitneyu(ours, theirs, axis=0, method="asymptotic").pvalue
    return np.asarray(false_discovery_control(np.nan_to_num(p_value, nan=1.0)) < 0.05)


def same(ours: DeLabels, theirs: DeLabels) -> bool:
    return all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in DeLabels._fields)


@pytest.mark.parametrize("max_values", [1, 1 << 26])
def test_labels_are_the_official_statistics_of_each_context(
    small_h5ad: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_values: int
) -> None:
    monkeypatch.setattr(pertcast.data.de_labels, "_MAX_VALUES", max_values)
    store = make_store(small_h5ad(contexts=("H1", "K562")), tmp_path / "store", fewshot={"d.H1": {"val": ["G1"]}})
    labels = de_labels(store)
    expected = {
        (context, pert)
        for context, name in enumerate(store.contexts)
        for pert, label in enumerate(store.perts)
        if label != store.control and (name, label) != ("H1", "G1")
    }
    assert set(zip(labels.context.tolist(), labels.pert.tolist(), strict=True)) == expected
    for row, (context, pert) in enumerate(zip(labels.context.tolist(), labels.pert.tolist(), strict=True)):
        np.testing.assert_array_equal(labels.significant[row], labels_by_scipy(store, context, pert))
        own = store.genes.index(store.perts[pert])
        assert labels.significant[row, own]


def test_rows_are_found_by_codes_and_the_control_and_held_out_have_none(small_h5ad: Builder, tmp_path: Path) -> None:
    store = make_store(small_h5ad(), tmp_path / "store", fewshot={"d.H1": {"test": ["G2"]}})
    labels = de_labels(store)
    perts = np.arange(len(store.perts), dtype=np.int32)
    rows = labels.find(np.zeros(len(perts), dtype=np.int32), perts)
    for pert, row in zip(perts, rows, strict=True):
        if store.perts[pert] in (store.control, "G2"):
            assert row == -1
        else:
            assert labels.pert[row] == pert


def test_labels_are_kept_and_another_store_s_or_damaged_ones_are_made_again(
    small_h5ad: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(small_h5ad("a.h5ad"), tmp_path / "store")
    first = de_labels(store)
    kept = store.path / LABELS_FILE
    with monkeypatch.context() as patch:
        patch.setattr(pertcast.data.de_labels, "_compute", None)
        assert same(de_labels(store), first)
    other = make_store(small_h5ad("b.h5ad", seed=5), tmp_path / "other")
    shutil.copy(kept, other.path / LABELS_FILE)
    assert not same(de_labels(other), first)
    kept.write_bytes(kept.read_bytes()[:300])
    assert same(de_labels(store), first)
    assert not list(store.path.glob(".*"))


def test_held_out_cells_reach_no_label(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad()
    cells = ad.read_h5ad(path)
    counts = cells.X.toarray()
    held_out = (cells.obs["target_gene"] == "G1").to_numpy()
    counts[held_out] = counts[held_out] * 7 + 100
    cells.X = sparse.csr_matrix(counts)
    planted_path = tmp_path / "planted" / path.name  # the draw of validation cells knows the file's name
    planted_path.parent.mkdir()
    cells.write_h5ad(planted_path)
    held = {"fewshot": {"d.H1": {"val": ["G1"]}}, "prepare": {"num_hvgs": 6, "target_sum": 1e4}}
    plain, planted = (
        de_labels(make_store(file, tmp_path / f"store{number}", **held))
        for number, file in enumerate((path, planted_path))
    )
    assert same(plain, planted)


def test_a_screen_without_training_controls_has_no_labels(small_h5ad: Builder, tmp_path: Path) -> None:
    store = make_store(small_h5ad(contexts=("H1", "K562")), tmp_path / "store")
    controls = (store.pert_codes == store.control_code) & (store.context_codes == store.contexts.index("H1"))
    store.split[controls] = Split.VAL
    assert {store.contexts[code] for code in de_labels(store).context} == {"K562"}
