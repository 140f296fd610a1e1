"""Perturbation features: reading them, fitting them, and what happens to targets that have none."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertcast.config import Experiment, FeaturesConfig
from pertcast.data.features import (
    CoverageRow,
    PertFeatures,
    coverage,
    load_features,
    open_features,
    read_vectors,
    save_features,
)
from pertcast.data.features.coexpression import coexpression_loadings, gene_correlations
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, DataError

TRAIN, VAL = Split.TRAIN, Split.VAL


@dataclass(frozen=True)
class MemoryStore:
    """A store in memory: control cells first, then one cell of each perturbation."""

    values: np.ndarray
    genes: tuple[str, ...]
    perts: tuple[str, ...]
    pert_codes: np.ndarray
    split: np.ndarray
    control: str = "non-targeting"
    control_code: int = 0

    @property
    def screen_codes(self) -> np.ndarray:
        return np.zeros(len(self.pert_codes), dtype=np.int32)

    def log1p(self, rows: np.ndarray, *, genes: np.ndarray | None = None) -> np.ndarray:
        chosen: np.ndarray = self.values[rows] if genes is None else self.values[np.ix_(rows, genes)]
        return chosen


def make_store(*, num_controls: int = 40, num_genes: int = 12, seed: int = 0) -> MemoryStore:
    """Genes G0..; G1 follows G0 and G3 opposes it; the last gene is never seen. P: G0, G2, G4 train, G5 validates."""
    rng = np.random.default_rng(seed)
    perts = ("non-targeting", "G0", "G2", "G4", "G5")
    values = rng.gamma(1.0, 1.0, size=(num_controls + 14, num_genes)).astype(np.float32)
    values[:, 1] = values[:, 0] + 0.05 * rng.normal(size=len(values))
    values[:, 3] = 9 - values[:, 0]
    values[:, -1] = 0
    codes = np.array([0] * num_controls + [0] * 10 + [1, 2, 3, 4])
    values[num_controls : num_controls + 10] += 100  # validation controls must not be looked at
    split = np.array([TRAIN] * num_controls + [VAL] * 10 + [TRAIN] * 3 + [VAL], dtype=np.uint8)
    return MemoryStore(values, tuple(f"G{i}" for i in range(num_genes)), perts, codes.astype(np.int32), split)


def file_config(path: Path, missing: str = "error") -> FeaturesConfig:
    return FeaturesConfig.model_validate({"kind": "file", "path": path, "missing": missing})


def write_pt(path: Path, vectors: dict[str, np.ndarray]) -> Path:
    torch.save({name: torch.from_numpy(vector) for name, vector in vectors.items()}, path)
    return path


def write_npz_pairs(path: Path, vectors: dict[str, np.ndarray]) -> Path:
    np.savez(path, gene=np.array(list(vectors)), embedding=np.stack(list(vectors.values())))
    return path


def write_npz_names(path: Path, vectors: dict[str, np.ndarray]) -> Path:
    np.savez(path, **vectors)  # type: ignore[arg-type]
    return path


def write_csv(path: Path, vectors: dict[str, np.ndarray]) -> Path:
    pd.DataFrame.from_dict(vectors, orient="index").rename_axis("gene").to_csv(path)
    return path


def write_parquet(path: Path, vectors: dict[str, np.ndarray]) -> Path:
    table = pd.DataFrame(np.stack(list(vectors.values())), columns=[f"d{i}" for i in range(3)])
    table.insert(0, "gene", list(vectors))
    table.to_parquet(path)
    return path


def write_parquet_index(path: Path, vectors: dict[str, np.ndarray]) -> Path:
    table = pd.DataFrame(np.stack(list(vectors.values())), columns=["a", "b", "c"], index=list(vectors))
    table.to_parquet(path)
    return path


WRITERS = {
    "pairs.npz": write_npz_pairs,
    "names.npz": write_npz_names,
    "table.csv": write_csv,
    "table.parquet": write_parquet,
    "index.parquet": write_parquet_index,
    "dict.pt": write_pt,
}
VECTORS = {name: np.arange(3, dtype=np.float32) + 10 * i for i, name in enumerate(("G0", "G2", "G4", "G5", "NA"))}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_vectors_that_were_written(name: str, tmp_path: Path) -> None:
    found = read_vectors(WRITERS[name](tmp_path / name, VECTORS))
    assert list(found) == list(VECTORS)
    for key, vector in VECTORS.items():
        np.testing.assert_array_equal(found[key], vector)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=6))
def test_csv_round_trips_numbers(rows: list[list[float]]) -> None:
    vectors = {f"g{i}": np.array(row, dtype=np.float64) for i, row in enumerate(rows)}
    with tempfile.TemporaryDirectory() as folder:
        found = read_vectors(write_csv(Path(folder) / "a.csv", vectors))
    for key, vector in vectors.items():
        np.testing.assert_allclose(found[key].astype(float), vector, rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", ["dict.pt", "pairs.npz", "table.parquet"])
def test_a_damaged_file_is_an_error_of_ours_or_read(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = WRITERS[name](Path(folder) / name, VECTORS)
        content = bytearray(path.read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.integers(1, 64))] = data.draw(st.binary(max_size=64))
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            assert read_vectors(path)


def test_bfloat16_and_lists_in_a_dict_are_read(tmp_path: Path) -> None:
    torch.save({"A": torch.ones(2, dtype=torch.bfloat16), "B": [1, 2]}, tmp_path / "a.pt")
    found = read_vectors(tmp_path / "a.pt")
    np.testing.assert_array_equal(found["A"], [1, 1])
    np.testing.assert_array_equal(found["B"], [1, 2])


def _raw(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _torch(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _npz(**arrays: object) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **arrays)  # type: ignore[arg-type]


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("a.txt", _raw("x"), "expected a .pt, .npz, .parquet or .csv"),
    ("a.pt", _raw(b"junk"), "cannot be read"),
    ("a.pt", _raw(b""), "cannot be read"),
    ("a.pt", _torch(torch.ones(3)), "got a Tensor"),
    ("a.pt", _torch({}), "no feature"),
    ("a.pt", _torch({"A": Path("x")}), "got other objects; save a dict of plain tensors"),
    ("a.pt", _torch({"A": torch.ones(2), "B": torch.ones(3), "C": torch.ones(2)}), r"2 as most have.*B \(3\)"),
    ("a.pt", _torch({"A": torch.tensor([1.0, float("nan")])}), "NaN or infinite values: A"),
    ("a.pt", _torch({"A": torch.ones(1, 2)}), "no vector of numbers: A"),
    ("a.pt", _torch({"A": "text"}), "no vector of numbers: A"),
    ("a.pt", _torch({1: torch.ones(2)}), "are no text: 1"),
    ("a.npz", _raw(b"junk"), "cannot be read"),
    ("a.npz", _raw(b"PK\x03\x04junk"), "cannot be read"),
    ("a.npz", lambda path: path.write_bytes(_npy(np.ones((2, 2)))), "cannot be read"),
    ("a.npz", _npz(gene=np.array(["A", "B"]), embedding=np.ones((3, 2))), "one row of `embedding`"),
    ("a.npz", _npz(gene=np.array(["A", "A"]), embedding=np.ones((2, 2))), "occur more than once: A"),
    ("a.npz", _npz(gene=np.array(["A"], dtype=object), embedding=np.ones((1, 2))), "cannot be read"),
    ("a.npz", _npz(gene=np.array(["A"]), embedding=np.array([["x", "y"]])), "no vector of numbers: A"),
    ("a.npz", _npz(gene=np.array(["A"]), embedding=np.array([[1, np.inf]])), "NaN or infinite values: A"),
    ("a.csv", _raw(""), "cannot be read"),
    ("a.csv", _raw("gene,a\n"), "no feature"),
    ("a.csv", _raw("gene\nA\n"), "1 column"),
    ("a.csv", _raw("gene,a,b\nA,1,2\nB,x,3\n"), "column 'a': no number for B"),
    ("a.csv", _raw("gene,a,b\nA,1,\nB,1,3\n"), "NaN or infinite values: A"),
    ("a.csv", _raw("gene,a\nA,1\nA,2\n"), "occur more than once: A"),
    ("a.csv", _raw("gene,a\nA,1,2,3\nB,2\n"), "more fields than the header"),
    ("a.csv", _raw(b"\xff\xfe\x00"), "UTF-16 text"),
    ("a.csv", _raw("gene,a\n,1\n"), "are no text"),
    ("a.parquet", _raw(b"junk"), "cannot be read"),
]


@pytest.mark.parametrize(("name", "write", "message"), BROKEN)
def test_a_broken_file_is_told_with_its_place(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        read_vectors(path)
    assert str(path) in str(caught.value)


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    genes = np.array(["A", "A", ""])
    np.savez(tmp_path / "a.npz", gene=genes, embedding=np.array([[1, np.nan], [np.nan, 2], [np.nan, 1]]))
    with pytest.raises(DataError) as caught:
        read_vectors(tmp_path / "a.npz")
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "occur more than once: A" in text
    assert "NaN" in text
    assert "no text" in text


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; correct features\.path"):
        read_vectors(tmp_path / "a.csv")


def test_onehot_has_a_column_for_each_training_label() -> None:
    store = make_store()
    with pytest.raises(DataError) as caught:
        load_features(FeaturesConfig(), store, targets=["G2", "G9"])
    assert [problem.place for problem in caught.value.problems] == ["'G5'", "'G9'"]
    assert "coexpression" in str(caught.value)
    assert 'features.missing = "mean"' in str(caught.value)

    features = load_features(FeaturesConfig(missing="mean"), store, targets=["G2", "G9"])
    assert features.names == ("non-targeting", "G0", "G2", "G4", "G5", "G9")
    np.testing.assert_array_equal(features.of(["non-targeting", "G0", "G2", "G4"]), np.eye(4))
    np.testing.assert_allclose(features.of(["G9"]), [[0, 1 / 3, 1 / 3, 1 / 3]])
    assert features.filled == dict.fromkeys(("G5", "G9"), "mean of 3 training targets")
    assert features.dim == 4


def label_store() -> MemoryStore:
    """Training labels G0, G2+G4 and G4; G0+G9 and G7+G8 validate."""
    perts = ("non-targeting", "G0", "G2+G4", "G4", "G0+G9", "G7+G8")
    codes = np.arange(6).astype(np.int32)
    split = np.array([TRAIN] * 4 + [VAL] * 2, dtype=np.uint8)
    values = np.ones((6, 12), dtype=np.float32)
    return MemoryStore(values, tuple(f"G{i}" for i in range(12)), perts, codes, split)


def test_label_features_tell_which_genes_of_training_labels_a_label_names() -> None:
    config = FeaturesConfig(kind="labels")
    with pytest.raises(DataError, match="no training label names a gene of it"):
        load_features(config, label_store())
    features = load_features(FeaturesConfig(kind="labels", missing="mean"), label_store(), targets=["G2"])
    expected: dict[str, list[float]] = {
        "non-targeting": [0, 0, 0],
        "G0": [1, 0, 0],
        "G2+G4": [0, 1, 1],
        "G4": [0, 0, 1],
        "G0+G9": [1, 0, 0],
        "G7+G8": [1 / 3, 1 / 3, 2 / 3],
        "G2": [0, 1, 0],
    }
    assert features.names == tuple(expected)
    np.testing.assert_allclose(features.matrix, np.array(list(expected.values())), rtol=1e-6)
    assert list(features.filled) == ["G7+G8"]


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_labels_of_several_genes_combine_their_features(how: str, tmp_path: Path) -> None:
    vectors = {name: np.array([place, 1.0], dtype=np.float32) for place, name in enumerate(["G0", "G2", "G4", "G9"])}
    path = write_npz_pairs(tmp_path / "f.npz", vectors)
    base = {"kind": "file", "path": path, "missing": "mean"}
    features = load_features(FeaturesConfig.model_validate({**base, "combine": how}), label_store())
    share = 1 if how == "sum" else 0.5
    np.testing.assert_allclose(features.of(["G2+G4"])[0], [3 * share, 2 * share])
    np.testing.assert_allclose(features.of(["G0+G9"])[0], [3 * share, 2 * share])
    assert list(features.filled) == ["G7+G8"]
    assert "G2+G4" in load_features(FeaturesConfig.model_validate(base), label_store()).filled


def test_file_features_are_taken_by_name_and_the_control_is_zero(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "a.pt", VECTORS)
    features = load_features(file_config(path), make_store(), targets=["NA", "G0"])
    np.testing.assert_array_equal(features.of(["NA", "non-targeting", "G5"]), [VECTORS["NA"], [0, 0, 0], VECTORS["G5"]])
    assert features.filled == {}
    assert features.matrix.dtype == np.float32
    assert "a.pt" in features.source

    own_control = write_pt(tmp_path / "b.pt", VECTORS | {"non-targeting": np.full(3, 7, dtype=np.float32)})
    np.testing.assert_array_equal(
        load_features(file_config(own_control), make_store()).of(["non-targeting"]), [[7] * 3]
    )


def test_every_target_without_a_feature_is_named_with_the_remedies(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "a.pt", {"G0": np.ones(2), "G2": np.ones(2)})
    with pytest.raises(DataError) as caught:
        load_features(file_config(path), make_store(), targets=["X1", "X2"])
    assert [problem.place for problem in caught.value.problems] == ["'G4'", "'G5'", "'X1'", "'X2'"]
    assert all(str(path) in problem.remedy for problem in caught.value.problems)


def test_missing_mean_is_the_mean_of_training_targets(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "a.pt", {name: VECTORS[name] for name in ("G0", "G2", "G5")})
    features = load_features(file_config(path, "mean"), make_store(), targets=["X1"])
    np.testing.assert_allclose(features.of(["X1", "G4"]), [(VECTORS["G0"] + VECTORS["G2"]) / 2] * 2)
    assert features.filled == dict.fromkeys(("G4", "X1"), "mean of 2 training targets")


def test_missing_nearest_is_the_covered_target_that_correlates_most(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "a.pt", VECTORS)
    features = load_features(file_config(path, "nearest"), make_store(), targets=["G1", "G3"])
    np.testing.assert_array_equal(features.of(["G1"]), [VECTORS["G0"]])
    assert features.filled["G1"].startswith("feature of G0 (r = 1.00")
    assert "G0" not in features.filled["G3"]  # it opposes G0


def test_nearest_cannot_be_found_for_unknown_and_silent_genes(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "a.pt", VECTORS)
    with pytest.raises(DataError) as caught:
        load_features(file_config(path, "nearest"), make_store(), targets=["G11", "XYZ", "G1"])
    assert [problem.place for problem in caught.value.problems] == ["'G11'", "'XYZ'"]
    assert "does not vary" in str(caught.value)
    assert "no gene of the gene list" in str(caught.value)


def test_nothing_to_fill_from_is_an_error(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "a.pt", {"Q": np.ones(2)})
    with pytest.raises(DataError, match="no training perturbation has a feature"):
        load_features(file_config(path, "mean"), make_store())


@pytest.mark.parametrize(("num_controls", "num_genes"), [(40, 12), (15, 30)])
def test_loadings_are_the_truncated_svd(num_controls: int, num_genes: int) -> None:
    store = make_store(num_controls=num_controls, num_genes=num_genes)
    rows = np.arange(num_controls)
    loadings, varies = coexpression_loadings(store, rows, num_loadings=5)
    centred = store.values[rows].astype(float) - store.values[rows].astype(float).mean(axis=0)
    _, singular, right = np.linalg.svd(centred / np.sqrt(num_controls), full_matrices=False)
    expected = right[:5].T * singular[:5]
    expected *= np.sign(expected[np.abs(expected).argmax(axis=0), np.arange(5)])
    np.testing.assert_allclose(loadings, expected, atol=2e-5)
    assert not varies[-1]
    assert varies[:-1].all()
    assert loadings[np.abs(loadings).argmax(axis=0), np.arange(5)].min() > 0


def test_all_loadings_give_the_covariance_of_genes() -> None:
    store = make_store()
    loadings, _ = coexpression_loadings(store, np.arange(40), num_loadings=12)
    np.testing.assert_allclose(loadings @ loadings.T, np.cov(store.values[:40].T, bias=True), atol=1e-4)


def test_coexpression_looks_at_training_controls_alone_and_keeps_every_gene() -> None:
    store = make_store()
    config = FeaturesConfig(kind="coexpression", num_loadings=4)
    features = load_features(config, store)
    expected, _ = coexpression_loadings(store, np.arange(40), num_loadings=4)
    np.testing.assert_array_equal(features.of(["G0", "G5", "G7"]), expected[[0, 5, 7]])
    np.testing.assert_array_equal(features.of(["non-targeting"]), np.zeros((1, 4)))
    np.testing.assert_array_equal(load_features(config, store).matrix, features.matrix)
    with pytest.raises(DataError, match="'G11': it has no feature"):
        load_features(config, store, targets=["G11"])
    with pytest.raises(DataError, match="at most 12"):
        load_features(FeaturesConfig(kind="coexpression", num_loadings=13), store)


def test_correlations_are_pearsons() -> None:
    store = make_store()
    found = gene_correlations(store, np.arange(40), genes=np.array([1, 11]), others=np.array([0, 2, 3]))
    expected = np.corrcoef(store.values[:40, [1, 0, 2, 3]].astype(float).T)[0, 1:]
    np.testing.assert_allclose(found[0], expected, atol=1e-9)
    assert np.isnan(found[1]).all()


def test_many_controls_are_drawn_the_same_each_time() -> None:
    store = make_store(num_controls=6000)
    config = FeaturesConfig(kind="coexpression", num_loadings=3)
    first, second = load_features(config, store), load_features(config, store)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert "4,096 of 6,000 training control cells" in first.source


def test_unknown_labels_are_all_named_with_near_misses() -> None:
    features = PertFeatures(("non-targeting", "STAT1"), np.eye(2, dtype=np.float32), "onehot", "non-targeting", "here")
    np.testing.assert_array_equal(features.of(["STAT1", "STAT1"]), [[0, 1], [0, 1]])
    assert features.of([]).shape == (0, 2)
    with pytest.raises(DataError) as caught:
        features.of(["STAT-1", "TET1", "STAT-1"])
    assert [problem.place for problem in caught.value.problems] == ["'STAT-1'", "'TET1'"]
    assert "did you mean 'STAT1'?" in str(caught.value)


def test_coverage_counts_own_and_filled_features(tmp_path: Path) -> None:
    store = make_store()
    path = write_pt(tmp_path / "a.pt", {name: VECTORS[name] for name in ("G0", "G2")})
    features = load_features(file_config(path, "mean"), store, targets=["X1"])
    assert coverage(features, store, ["G0", "X1", "unseen", "non-targeting"]) == [
        CoverageRow("training perturbations", 2, 1, 3),
        CoverageRow("held-out perturbations", 0, 1, 1),
        CoverageRow("targets", 1, 1, 3),
    ]


def test_saved_features_open_as_they_were(tmp_path: Path) -> None:
    features = load_features(FeaturesConfig(missing="mean"), make_store())
    save_features(features, tmp_path / "features")
    opened = open_features(tmp_path / "features")
    assert (opened.names, opened.filled, opened.source) == (features.names, features.filled, features.source)
    np.testing.assert_array_equal(opened.matrix, features.matrix)


def test_broken_saved_features_are_told(tmp_path: Path) -> None:
    features = load_features(FeaturesConfig(missing="mean"), make_store())
    with pytest.raises(CheckpointError, match="no such file"):
        open_features(tmp_path)
    save_features(features, tmp_path)
    facts = (tmp_path / "features.json").read_text()
    (tmp_path / "features.json").write_text(facts.replace('"G5"\n', '"G5",\n  "G6"\n'))
    with pytest.raises(CheckpointError, match="expected 6 rows"):
        open_features(tmp_path)
    (tmp_path / "features.json").write_text(facts.replace('"kind"', '"kinds"'))
    with pytest.raises(CheckpointError, match="no features of pertcast"):
        open_features(tmp_path)
    (tmp_path / "features.json").write_text(facts)
    (tmp_path / "features.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="train the run again"):
        open_features(tmp_path)


@pytest.mark.parametrize("kind", ["onehot", "coexpression"])
def test_features_of_a_real_store(kind: str, small_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    path = small_h5ad(cells_per_group=20)
    experiment = Experiment.model_validate(
        {
            "datasets": {"d": str(path)},
            "training": {"d": "train"},
            "columns": {"context": "H1", "batch": "batch"},
            "features": {"kind": kind, "num_loadings": 5},
        }
    )
    store = Store.open(prepare(experiment, tmp_path / "store"))
    features = load_features(experiment.features, store)
    assert features.of(store.perts).shape == (4, features.dim)
    assert coverage(features, store, ["G1"])[0] == CoverageRow("training perturbations", 3, 0, 3)
    if kind == "coexpression":
        rows = store.rows(split=Split.TRAIN, pert=store.control_code)
        centred = store.log1p(rows).astype(float)
        centred -= centred.mean(axis=0)
        gene = store.genes.index("G1")
        covariance = centred.T @ centred / len(rows)
        assert np.linalg.norm(features.of(["G1"])) ** 2 <= covariance[gene, gene] * (1 + 1e-4)


def test_the_real_esm2_file(shared_data: Path) -> None:
    found = read_vectors(shared_data / "ESM2_pert_features_vcc150.pt")
    assert len(found) == 150
    assert {vector.shape for vector in found.values()} == {(1280,)}


def test_the_real_go_file(shared_data: Path) -> None:
    found = read_vectors(shared_data / "go_bp_svd256.npz")
    assert len(found) == 15_265
    targets = (shared_data / "vcc2026" / "pert_counts.csv").read_text().split()[1:]
    assert sum(target in found for target in targets) == 254


def test_importing_features_does_not_import_torch() -> None:
    code = "import sys, pertcast.data.features; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
