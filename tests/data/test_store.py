"""The training store against a slow twin in memory; what is fitted, what is noted, what is refused, what is skipped."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import pertcast.data.prepare
from pertcast.config import Experiment
from pertcast.data.genes import choose_hvgs
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.data.store_arrays import GrowingArray, ValueArray
from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import Manifest, verify_artefact, write_manifest
from pertcast.progress import Advance

Builder = Callable[..., Path]


def _experiment(path: Path, **sections: Any) -> Experiment:
    sections.setdefault("datasets", {"d": str(path)})
    sections.setdefault("training", {"d": "train"})
    sections.setdefault("columns", {"cell_type": "cell_type", "batch": "batch"})
    sections.setdefault("prepare", {"num_hvgs": 6})
    return Experiment.model_validate(sections, strict=False)


def _list_of(genes: Path, num_genes: int | None = None) -> dict[str, Any]:
    """Return a submission section with a gene list of just as many genes as the rules say."""
    return {"genes": str(genes), "rules": {"num_genes": num_genes or len(genes.read_text().split())}}


class _Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[int]] = {}
        self.notes: list[str] = []

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        counted = self.tasks.setdefault(label, [total, 0])

        def advance(amount: int, detail: str = "") -> None:
            counted[1] += amount

        yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        raise AssertionError("prepare shows no table")


def _dense(path: Path) -> np.ndarray:
    result: np.ndarray = sparse.csr_matrix(ad.read_h5ad(path).X).toarray().astype(np.float64)
    return result


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("block_values", [25, 1 << 22])
def test_counts_against_a_slow_twin(
    small_h5ad: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, block_values: int
) -> None:
    monkeypatch.setattr(pertcast.data.prepare, "_BLOCK_VALUES", block_values)
    path = small_h5ad(layout=layout, contexts=("H1", "K562"))
    experiment = _experiment(path, fewshot={"d.H1": {"val": ["G1"], "test": ["G2"]}})
    store = Store.open(prepare(experiment, tmp_path / "store"))
    counts, obs = _dense(path), ad.read_h5ad(path).obs
    trained = (store.split & Split.TRAIN) > 0
    assert store.scale == "counts"
    assert store.num_cells == len(counts)
    np.testing.assert_array_equal(store.totals, counts.sum(1))
    assert store.target_sum == np.median(counts[trained].sum(1))
    expected = np.log1p(counts / counts.sum(1, keepdims=True) * store.target_sum)
    rows = np.array([5, 3, 3, 190, 0])
    np.testing.assert_allclose(store.log1p(rows), expected[rows], rtol=2e-6)
    np.testing.assert_array_equal(store.csr(rows).toarray(), store.log1p(rows))
    genes = np.array([7, 0, 19])
    np.testing.assert_array_equal(store.log1p(rows, genes=genes), store.log1p(rows)[:, genes])
    assert store.csr(rows[:0]).shape == (0, 20)
    controls = trained & (obs["target_gene"] == "non-targeting").to_numpy()
    np.testing.assert_allclose(store.control_mean_log1p, expected[controls].mean(0), rtol=1e-5)
    fitted = np.expm1(expected[trained])
    assert store.hvg.tolist() == choose_hvgs(fitted.mean(0), fitted.var(0, ddof=1), num=6).tolist()
    assert [store.perts[code] for code in store.pert_codes] == obs["target_gene"].tolist()
    assert [store.contexts[code] for code in store.context_codes] == obs["cell_type"].tolist()
    assert [store.batches[code] for code in store.batch_codes] == obs["batch"].tolist()
    assert store.perts[store.control_code] == store.control == "non-targeting"
    assert verify_artefact(store.path) == []


def test_layouts_and_blocks_give_the_same_arrays(
    small_h5ad: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for layout, block_values in itertools.product(("csr", "csc", "dense"), (30, 1 << 20)):
        monkeypatch.setattr(pertcast.data.prepare, "_BLOCK_VALUES", block_values)
        small_h5ad(layout=layout)
        out = prepare(_experiment(tmp_path / "small.h5ad"), tmp_path / f"{layout}{block_values}")
        kept = ("data.npy", "indices.npy", "indptr.npy", "split.npy", "totals.npy", "hvg.npy")
        digests.add(b"".join((out / name).read_bytes() for name in kept))
    assert len(digests) == 1


def test_log1p_is_kept_as_it_is(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad(scale="log1p")
    store = Store.open(prepare(_experiment(path), tmp_path / "store"))
    assert store.scale == "log1p"
    assert store.target_sum == pytest.approx(1e4, rel=1e-3)
    np.testing.assert_array_equal(store.log1p(np.arange(96)), _dense(path).astype(np.float32))
    np.testing.assert_allclose(store.totals, 1e4, rtol=1e-4)
    with pytest.raises(DataError, match=r"expected values normalised to 50,000, got log1p values normalised to 10,000"):
        prepare(_experiment(path, prepare={"target_sum": 5e4}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_log1p_over_other_genes_has_no_target_sum(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad(scale="log1p")
    genes = tmp_path / "genes.csv"
    genes.write_text("G1\nG5\nG2\n")
    store = Store.open(prepare(_experiment(path, submission=_list_of(genes)), tmp_path / "store"))
    assert store.target_sum is None
    assert any("the target sum is unknown" in note for note in store.notes)
    np.testing.assert_array_equal(store.log1p(np.arange(96)), _dense(path)[:, [1, 5, 2]].astype(np.float32))


def test_a_log1p_file_that_starts_with_empty_cells(
    small_h5ad: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pertcast.data.prepare, "_BLOCK_VALUES", 20)
    path = small_h5ad(scale="log1p")
    data = ad.read_h5ad(path)
    dense = data.X.toarray()
    dense[:3] = 0
    dense[1, 4] = 2.0
    data.X = sparse.csr_matrix(dense)
    data.write_h5ad(path)
    store = Store.open(prepare(_experiment(path), tmp_path / "store"))
    np.testing.assert_allclose(store.totals, np.expm1(dense.astype(np.float64)).sum(1), rtol=1e-6)
    assert any("2 cells have no count in these genes" in note for note in store.notes)


def test_a_given_target_sum(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad()
    store = Store.open(prepare(_experiment(path, prepare={"target_sum": 1e4}), tmp_path / "store"))
    counts = _dense(path)
    np.testing.assert_allclose(
        store.log1p(np.arange(96)), np.log1p(counts / counts.sum(1, keepdims=True) * 1e4), rtol=2e-6
    )


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)]
)
def test_counts_lie_in_the_narrowest_type(small_h5ad: Builder, tmp_path: Path, largest: int, dtype: type) -> None:
    path = small_h5ad()
    data = ad.read_h5ad(path)
    data.X = np.minimum(data.X.toarray(), 200)
    data.X[50, 3] = largest
    data.write_h5ad(path)
    out = prepare(_experiment(path), tmp_path / "store")
    stored = np.load(out / "data.npy", mmap_mode="r")
    assert stored.dtype == dtype
    assert stored.max() == largest
    assert np.load(out / "indices.npy", mmap_mode="r").dtype == np.uint16


def test_values_widen_without_loss(tmp_path: Path) -> None:
    parts = [
        np.array([1, 2]),
        np.array([300.0]),
        np.array([70_000]),
        np.array([], dtype=np.int64),
        np.array([0.5], dtype=np.float32),
    ]
    array = ValueArray(tmp_path / "v.npy")
    for part in parts:
        array.append(part, place="here")
    array.close()
    assert np.load(tmp_path / "v.npy").tolist() == [1, 2, 300, 70_000, 0.5]
    with pytest.raises(DataError, match=r"here: a count of 5,000,000,000 is too large"):
        array.append(np.array([5e9]), place="here")
    assert [path.name for path in tmp_path.glob("v*")] == ["v.npy"]


def test_a_growing_array_is_a_plain_npy_file(tmp_path: Path) -> None:
    array = GrowingArray(tmp_path / "a.npy", np.dtype(np.int32))
    for start in range(0, 1000, 100):
        array.append(np.arange(start, start + 100))
    array.close()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.arange(1000))


def test_files_with_genes_in_other_orders(small_h5ad: Builder, tmp_path: Path) -> None:
    genes = [f"G{i}" for i in range(20)]
    first = small_h5ad("a.h5ad", genes=genes, seed=1)
    second = small_h5ad("b.h5ad", genes=["X1", *genes[::-1]], seed=2, contexts=("K562",))
    store = Store.open(prepare(_experiment(tmp_path / "*.h5ad"), tmp_path / "store"))
    assert store.genes == tuple(genes)
    expected = np.concatenate([_dense(first), _dense(second)[:, :0:-1]])
    np.testing.assert_array_equal(store.totals, expected.sum(1))
    scaled = np.log1p(expected / expected.sum(1, keepdims=True) * store.target_sum)
    np.testing.assert_allclose(store.log1p(np.arange(192)), scaled, rtol=2e-6)
    assert store.csr(np.arange(192)).has_sorted_indices
    assert store.notes == ("b.h5ad: 1 genes that are not in the gene list were dropped: X1",)


def test_missing_genes_are_an_error_or_asked_for(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad()
    genes = tmp_path / "genes.csv"
    genes.write_text("\n".join(["g1", "G1", "G2", "G3", "TP53"]) + "\n")
    with pytest.raises(DataError) as caught:
        prepare(_experiment(path, submission=_list_of(genes)), tmp_path / "store")
    assert "it lacks 2 of the 5 genes of the list: g1, TP53" in str(caught.value)
    assert 'prepare.missing_genes = "zero"' in str(caught.value)
    zero = _experiment(path, submission=_list_of(genes), prepare={"missing_genes": "zero"})
    store = Store.open(prepare(zero, tmp_path / "store"))
    assert (store.log1p(np.arange(96))[:, [0, 4]] == 0).all()
    assert any("2 genes that it lacks count as 0 in its cells: g1, TP53" in note for note in store.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("G1\nG2\nG1\n", "gene 'G1' is on line 1 already"),
        ("", "expected 3 genes of season vcc2025, got 0"),
        ("G1\nG2\n", "num_genes=2"),
        ("gene_name\nG1\nG2\nG3\n", "got 'gene_name', a header"),
    ],
)
def test_a_wrong_gene_list(small_h5ad: Builder, tmp_path: Path, text: str, message: str) -> None:
    genes = tmp_path / "genes.csv"
    genes.write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(_experiment(small_h5ad(), submission=_list_of(genes, 3)), tmp_path / "store")


def test_rows_of_a_split_context_and_perturbation(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad(contexts=("H1", "K562"))
    store = Store.open(prepare(_experiment(path, zeroshot={"d.K562": "test"}), tmp_path / "store"))
    context = store.contexts.index("K562")
    pert = store.perts.index("G1")
    rows = store.rows(split=Split.TEST, context=context, pert=pert)
    assert rows.dtype == np.int64
    assert rows.tolist() == [i for i in range(192) if store.pert_codes[i] == pert and store.context_codes[i] == context]
    everything = store.rows(split=Split.TRAIN | Split.VAL | Split.TEST)
    assert everything.tolist() == list(range(192))
    assert store.rows(split=Split(0)).size == 0
    with pytest.raises(IndexError):
        store.csr(np.array([192]))


def test_unused_cells_are_kept_and_noted(small_h5ad: Builder, tmp_path: Path) -> None:
    small_h5ad("a.h5ad")
    small_h5ad("b.h5ad", contexts=("K562",))
    datasets = {"d": str(tmp_path / "a.h5ad"), "e": str(tmp_path / "b.h5ad")}
    store = Store.open(prepare(_experiment(tmp_path, datasets=datasets), tmp_path / "store"))
    assert store.rows(split=Split(0)).tolist() == list(range(96, 192))
    assert any("96 of 96 cells of e.K562 are not used" in note for note in store.notes)


def test_embeddings_are_stored_where_the_model_reads_them(small_h5ad: Builder, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected = []
    for name in ("a.h5ad", "b.h5ad"):
        data = ad.read_h5ad(small_h5ad(name))
        data.obsm["X_state"] = rng.normal(size=(96, 5)).astype(np.float32)
        expected.append(data.obsm["X_state"])
        data.write_h5ad(tmp_path / name)
    reads = {"input": "obsm:X_state"}
    store = Store.open(prepare(_experiment(tmp_path / "*.h5ad", model=reads), tmp_path / "store"))
    rows = np.array([100, 3, 3])
    np.testing.assert_array_equal(store.embedding(rows, "X_state"), np.concatenate(expected)[rows])
    assert store.embedding_keys == ("X_state",)
    with pytest.raises(CheckpointError, match="no embedding 'X_pca' is stored; there is X_state"):
        store.embedding(rows, "X_pca")
    data.obsm["X_state"] = data.obsm["X_state"][:, :4]
    data.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(DataError, match=re.escape("expected 5 dimensions as in a.h5ad, got 4")):
        prepare(_experiment(tmp_path / "*.h5ad", model=reads), tmp_path / "other")
    small_h5ad("b.h5ad")
    with pytest.raises(DataError, match="no embedding 'X_state'; there is none"):
        prepare(_experiment(tmp_path / "*.h5ad", model=reads), tmp_path / "other")


def test_a_current_store_is_left_alone(small_h5ad: Builder, tmp_path: Path) -> None:
    path, out = small_h5ad(), tmp_path / "store"
    progress = _Recorder()
    prepare(_experiment(path), out, progress=progress)
    assert progress.tasks["prepare"] == [96, 96]
    assert progress.tasks["fit"] == [96, 96]
    first = Store.open(out).fingerprint
    again = _Recorder()
    prepare(_experiment(path, train={"steps": 7}), out, progress=again)
    assert set(again.tasks) == {"hash inputs"}
    assert "is current" in again.notes[0]
    changed = _Recorder()
    prepare(_experiment(path, prepare={"num_hvgs": 3}), out, progress=changed)
    assert "prepare" in changed.tasks
    assert Store.open(out).fingerprint != first
    small_h5ad(seed=5)
    rebuilt = _Recorder()
    prepare(_experiment(path, prepare={"num_hvgs": 3}), out, progress=rebuilt)
    assert "prepare" in rebuilt.tasks
    (out / "data.npy").unlink()
    prepare(_experiment(path, prepare={"num_hvgs": 3}), out)
    assert (out / "data.npy").is_file()


def test_the_fingerprint_is_of_the_content(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad()
    moved = tmp_path / "elsewhere" / path.name
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    one = Store.open(prepare(_experiment(path), tmp_path / "one"))
    two = Store.open(prepare(_experiment(moved), tmp_path / "two"))
    assert one.fingerprint == two.fingerprint
    assert one.config != two.config


def test_nothing_is_left_behind_by_an_error(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad()
    data = ad.read_h5ad(path)
    data.X[90, 4] = np.nan
    data.write_h5ad(path)
    with pytest.raises(DataError, match=r"small.h5ad, cell 90 \(from 0\), gene 'G4': expected a finite value"):
        prepare(_experiment(path), tmp_path / "store")
    assert [item.name for item in tmp_path.iterdir()] == ["small.h5ad"]


@pytest.mark.parametrize(("base", "kind"), [(2.0, "csr"), (10.0, "dense")])
def test_a_logarithm_whose_base_is_stated_is_converted(
    small_h5ad: Builder, tmp_path: Path, base: float, kind: str
) -> None:
    path = small_h5ad("a.h5ad", scale="log1p")
    expected = _dense(path)
    data = ad.read_h5ad(path)
    values = expected.astype(np.float32) / np.float32(np.log(base))
    data.X = sparse.csr_matrix(values) if kind == "csr" else values
    data.uns["log1p"] = {"base": base}
    data.write_h5ad(path)
    progress = _Recorder()
    store = Store.open(prepare(_experiment(path), tmp_path / "store", progress=progress))
    np.testing.assert_allclose(store.log1p(np.arange(store.num_cells)), expected, rtol=1e-5)
    assert any(f"converted from log{base:g}" in note for note in progress.notes)


def test_whole_counts_are_not_converted_by_a_stale_base(small_h5ad: Builder, tmp_path: Path) -> None:
    path = small_h5ad()
    expected = _dense(path)
    data = ad.read_h5ad(path)
    data.uns["log1p"] = {"base": 2}
    data.write_h5ad(path)
    store = Store.open(prepare(_experiment(path), tmp_path / "store"))
    assert store.scale == "counts"
    np.testing.assert_equal(store.counts(np.arange(store.num_cells)).toarray(), expected)


@pytest.mark.parametrize("layer", ["counts", "raw"])
def test_counts_are_read_from_a_layer_or_raw(small_h5ad: Builder, tmp_path: Path, layer: str) -> None:
    path = small_h5ad()
    expected = _dense(path)
    data = ad.read_h5ad(path)
    if layer == "raw":
        data.raw = data.copy()
        data = data[:, 3:].copy()
        assert data.raw is not None
    else:
        data.layers["counts"] = data.X.copy()
    dense = np.asarray(data.X.todense(), dtype=np.float32)
    data.X = dense - dense.mean(0)
    data.write_h5ad(path)
    columns = {"cell_type": "cell_type", "batch": "batch"}
    with pytest.raises(DataError, match=rf"set columns.layer to read another matrix of the file \('{layer}'\)"):
        prepare(_experiment(path), tmp_path / "store")
    for given in ({"layer": layer}, {"of": {"d": {"layer": layer}}}):
        out = tmp_path / f"store_{'of' in given}"
        store = Store.open(prepare(_experiment(path, columns=columns | given), out))
        assert store.scale == "counts"
        np.testing.assert_equal(store.counts(np.arange(store.num_cells)).toarray(), expected)
    with pytest.raises(DataError, match=rf"expected the layer 'count', got '{layer}'"):
        prepare(_experiment(path, columns=columns | {"layer": "count"}), tmp_path / "store")


def test_files_on_two_scales_are_refused(small_h5ad: Builder, tmp_path: Path) -> None:
    small_h5ad("a.h5ad")
    small_h5ad("b.h5ad", scale="log1p")
    with pytest.raises(DataError, match="the files of one experiment are on different scales"):
        prepare(_experiment(tmp_path / "*.h5ad"), tmp_path / "store")


def test_another_artefact_is_not_replaced(small_h5ad: Builder, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_manifest(tmp_path / "run", Manifest(kind="run"))
    with pytest.raises(DataError, match="it is a run, not a store"):
        prepare(_experiment(small_h5ad()), tmp_path / "run")


@pytest.mark.parametrize("damage", ["remove", "cut", "shorten"])
def test_a_damaged_store_is_an_error(small_h5ad: Builder, tmp_path: Path, damage: str) -> None:
    out = prepare(_experiment(small_h5ad()), tmp_path / "store")
    data = out / "data.npy"
    if damage == "remove":
        data.unlink()
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:-10])
    else:
        np.save(data, np.load(data)[:-1])
    with pytest.raises(CheckpointError, match="run `pertcast prepare` again"):
        Store.open(out)


def test_a_store_pickles_as_its_path(small_h5ad: Builder, tmp_path: Path) -> None:
    store = Store.open(prepare(_experiment(small_h5ad()), tmp_path / "store"))
    packed = pickle.dumps(store)
    assert len(packed) < 1000
    np.testing.assert_array_equal(pickle.loads(packed).log1p(np.arange(4)), store.log1p(np.arange(4)))


def test_real_cells(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "H1-VCC-2025-training.h5ad"
    columns = {"context": "H1", "batch": "batch"}
    store = Store.open(prepare(_experiment(path, columns=columns, prepare={"holdout_cells": 0.2}), tmp_path / "store"))
    counts = _dense(path)
    expected = np.log1p(counts / counts.sum(1, keepdims=True) * store.target_sum)
    np.testing.assert_allclose(store.log1p(np.arange(600)), expected, rtol=3e-6)
    assert len(store.batches) == 48
    assert len(store.rows(split=Split.VAL)) == 5 * 20 + 10
