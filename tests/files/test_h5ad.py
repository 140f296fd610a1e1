"""Reading and writing AnnData files: every layout, bounded blocks, broken files, bytes that do not depend on blocks."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from pertcast.errors import DataError
from pertcast.files.h5ad import open_h5ad, row_bands
from pertcast.files.h5ad_writer import CsrWriter

Builder = Callable[..., Path]


def _matrix(seed: int = 0, *, shape: tuple[int, int] = (37, 11), density: float = 0.3) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(3, size=shape) * (rng.random(shape) < density)
    return sparse.csr_matrix(dense.astype(np.float32))


def _write(path: Path, matrix: Any, **parts: Any) -> Path:
    var = pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])])
    obs = pd.DataFrame({"pert": ["a"] * matrix.shape[0]}, index=[f"c{i}" for i in range(matrix.shape[0])])
    ad.AnnData(matrix, obs=parts.pop("obs", obs), var=var, **parts).write_h5ad(path)
    return path


def _read(path: Path, max_values: int) -> tuple[list[int], list[sparse.csr_matrix]]:
    with open_h5ad(path) as reader:
        pairs = list(reader.chunks(max_values=max_values))
    return [first for first, _ in pairs], [block for _, block in pairs]


@pytest.mark.parametrize("max_values", [1, 7, 40, 1 << 24])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_blocks_join_to_the_matrix(tmp_path: Path, layout: str, max_values: int) -> None:
    matrix = _matrix()
    stored = {"csr": matrix, "csc": matrix.tocsc(), "dense": matrix.toarray()}[layout]
    firsts, blocks = _read(_write(tmp_path / "a.h5ad", stored), max_values)
    assert np.array_equal(sparse.vstack(blocks).toarray(), matrix.toarray())
    assert firsts == [0, *np.cumsum([block.shape[0] for block in blocks])[:-1]]
    stored_of = [block.shape[0] * matrix.shape[1] if layout == "dense" else block.nnz for block in blocks]
    assert all(number <= max_values or block.shape[0] == 1 for number, block in zip(stored_of, blocks, strict=True))
    assert all(block.has_canonical_format and block.has_sorted_indices for block in blocks)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, np.float64, np.float32, bool])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_number_types_are_kept(tmp_path: Path, layout: str, dtype: type) -> None:
    dense: np.ndarray = _matrix().toarray().astype(dtype)
    stored = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.array}[layout](dense)  # type: ignore[operator]
    _, blocks = _read(_write(tmp_path / "a.h5ad", stored), 50)
    assert blocks[0].dtype == (np.uint8 if dtype is bool else dtype)
    assert np.array_equal(sparse.vstack(blocks).toarray(), dense)


def test_a_column_file_leaves_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = _write(tmp_path / "a.h5ad", _matrix().tocsc())
    with open_h5ad(path) as reader:
        next(reader.chunks(max_values=10))
        assert any(folder.iterdir())
        again = [block.toarray() for _, block in reader.chunks(max_values=20)]
    assert np.array_equal(np.concatenate(again), _matrix().toarray())
    assert not any(folder.iterdir())


def test_a_full_temporary_disk_says_how_much_room_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    path = _write(tmp_path / "a.h5ad", _matrix().tocsc())
    with open_h5ad(path) as reader, pytest.raises(DataError, match=r"set TMPDIR to a disk with .* GB free"):
        list(reader.chunks())


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 12))
def test_bands_cover_all_rows_within_the_limit(lengths: list[int], limit: int) -> None:
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    bounds = row_bands(indptr, max_values=limit)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    for start, stop in itertools.pairwise(bounds):
        assert stop > start
        assert stop == start + 1 or indptr[stop] - indptr[start] <= limit
        if stop < len(lengths):
            assert stop == start + 1 or indptr[stop + 1] - indptr[start] > limit


def test_facts_of_a_file(small_h5ad: Builder) -> None:
    with open_h5ad(small_h5ad()) as reader:
        assert (reader.num_cells, reader.num_genes, reader.layout) == (96, 20, "csr")
        assert reader.genes[:2] == ("G0", "G1")
        assert reader.num_stored == sum(block.nnz for _, block in reader.chunks())
        assert reader.obs_columns == ("cell_type", "target_gene", "batch")
        assert reader.obs_names()[:2].tolist() == ["cell0", "cell1"]
        assert reader.dtype == np.float32


def test_columns_of_every_kind_come_as_strings(tmp_path: Path) -> None:
    obs = pd.DataFrame(
        {
            "categorical": pd.Categorical(["b", "a", None], categories=["c", "b", "a"]),
            "text": ["x", "y", "x"],
            "number": [3, 1, 3],
            "real": [0.5, np.nan, 2.0],
            "truth": [True, False, True],
            "gaps": pd.array([1, None, 2], dtype="Int64"),
            "numbers": pd.Categorical([10, 20, 10]),
        },
        index=["c0", "c1", "c2"],
    )
    path = _write(tmp_path / "a.h5ad", _matrix(shape=(3, 4)), obs=obs)
    expected = {
        "categorical": ["b", "a", None],
        "text": ["x", "y", "x"],
        "number": ["3", "1", "3"],
        "real": ["0.5", None, "2.0"],
        "truth": ["True", "False", "True"],
        "gaps": ["1", None, "2"],
        "numbers": ["10", "20", "10"],
    }
    with open_h5ad(path) as reader:
        for column, values in expected.items():
            read = reader.obs(column)
            labels = read.categories.tolist()
            assert all(isinstance(label, str) for label in labels)
            found = [None if code < 0 else labels[code] for code in read.codes.tolist()]
            assert found == values, column


def test_categories_of_old_files(small_h5ad: Builder) -> None:
    path = small_h5ad()
    with h5py.File(path, "r+") as file:
        labels, codes = file["obs/batch/categories"][()], file["obs/batch/codes"][()]
        del file["obs/batch"]
        file["obs/__categories/batch"] = labels
        column = file["obs"].create_dataset("batch", data=codes)
        column.attrs["categories"] = file["obs/__categories/batch"].ref
    with open_h5ad(path) as reader:
        assert reader.obs("batch").astype(str).tolist()[:13] == ["b1"] * 12 + ["b2"]
        assert "__categories" not in reader.obs_columns


def test_embeddings_are_read_by_rows(tmp_path: Path) -> None:
    embedding = np.arange(37 * 3, dtype=np.float64).reshape(37, 3)
    path = _write(tmp_path / "a.h5ad", _matrix(), obsm={"X_state": embedding})
    with open_h5ad(path) as reader:
        assert reader.obsm_keys == ("X_state",)
        part = reader.embedding("X_state", 5, 9)
        assert part.dtype == np.float32
        assert np.array_equal(part, embedding[5:9])
        with pytest.raises(DataError, match="no embedding 'X_pca'; there is X_state"):
            reader.embedding("X_pca", 0, 1)


def test_a_missing_column_names_what_is_there(small_h5ad: Builder) -> None:
    with open_h5ad(small_h5ad()) as reader, pytest.raises(DataError) as caught:
        reader.obs("target-gene")
    assert "got cell_type, target_gene, batch; did you mean 'target_gene'?" in str(caught.value)


def _delete(*names: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            for name in names:
                del file[name]

    return change


def _assign(name: str, position: int, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file[name][position] = value

    return change


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def _replace_x_with_text(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = "text"


def _shorten_indices(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        indices = file["X/indices"][:-1]
        del file["X/indices"]
        file["X/indices"] = indices


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (lambda path: path.unlink(), "no such file"),
    "text": (lambda path: path.write_text("cell,gene\n"), "not an HDF5 file"),
    "empty": (lambda path: path.write_bytes(b""), "not an HDF5 file"),
    "truncated": (_truncate, "truncated or damaged"),
    "no X": (_delete("X"), "expected X, obs and var, got"),
    "no obs": (_delete("obs"), "expected X, obs and var, got"),
    "no var": (_delete("var"), "expected X, obs and var, got"),
    "no gene names": (_delete("var/_index"), "its index '_index' is not in the file"),
    "X is text": (_replace_x_with_text, "expected two dimensions"),
    "no indices": (_delete("X/indices"), "X: cannot be read"),
    "no shape": (lambda path: _drop_attribute(path, "X", "shape"), "X: cannot be read"),
    "indices too short": (_shorten_indices, "indices for"),
    "a gene name twice": (_assign("var/_index", 3, "G0"), "1 gene names repeat: 'G0'"),
    "indptr falls": (_assign("X/indptr", 4, 10_000), "it falls at position 5"),
    "indptr ends early": (_assign("X/indptr", -1, 3), "expected 0 to"),
    "a column too high": (_assign("X/indices", 7, 20), "entry 7 is 20, outside 0 to 19"),
    "a negative column": (_assign("X/indices", 7, -1), "entry 7 is -1"),
    "a column twice": (_assign("X/indices", 1, 0), "row 0: a gene occurs twice"),
    "codes without category": (_assign("obs/target_gene/codes", 2, 9), "codes outside the 4 categories"),
    "short column": (_delete("obs/target_gene/codes"), "obs['target_gene']: cannot be read"),
}


def _drop_attribute(path: Path, node: str, name: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[node].attrs[name]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_error_with_its_place(small_h5ad: Builder, name: str) -> None:
    path = small_h5ad()
    change, message = BROKEN[name]
    change(path)
    with pytest.raises(DataError, match=re.escape(message)) as caught, open_h5ad(path) as reader:
        list(reader.chunks(max_values=100))
        reader.obs("target_gene")
    problems = caught.value.problems
    assert len(problems) == 1
    assert str(path) in problems[0].place
    assert problems[0].remedy


def test_a_broken_column_file_is_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5ad", _matrix().tocsc())
    with h5py.File(path, "r+") as file:
        file["X/indices"][5] = 37
    with open_h5ad(path) as reader, pytest.raises(DataError, match="entry 5 is 37, outside 0 to 36"):
        list(reader.chunks(max_values=8))


def _obs(number: int) -> pd.DataFrame:
    labels = pd.Categorical(["TET1", "non-targeting"] * number)[:number]
    return pd.DataFrame(
        {"target_gene": labels, "batch": [f"b{i % 3}" for i in range(number)], "n": np.arange(number)},
        index=[f"c{i}" for i in range(number)],
    )


def _write_blocks(path: Path, matrix: sparse.csr_matrix, sizes: list[int]) -> bytes:
    with CsrWriter(path, [f"g{i}" for i in range(matrix.shape[1])]) as writer:
        start = 0
        for size in [*sizes, matrix.shape[0]]:
            writer.append(matrix[start : start + size])
            start += size
        writer.finish(_obs(matrix.shape[0]))
    return path.read_bytes()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.lists(st.integers(0, 12), max_size=6), st.integers(0, 1 << 16))
def test_bytes_do_not_depend_on_blocks_and_read_back_equal(rows: int, sizes: list[int], seed: int) -> None:
    matrix = _matrix(seed, shape=(rows, 9))
    with tempfile.TemporaryDirectory() as folder:
        once = _write_blocks(Path(folder) / "a.h5ad", matrix, [])
        assert _write_blocks(Path(folder) / "b.h5ad", matrix, sizes) == once
        back = ad.read_h5ad(Path(folder) / "b.h5ad")
    assert np.array_equal(back.X.toarray(), matrix.toarray())
    assert back.X.dtype == np.float32
    assert back.var_names.tolist() == [f"g{i}" for i in range(9)]
    pd.testing.assert_frame_equal(back.obs, _obs(rows), check_categorical=rows > 0, check_dtype=rows > 0)


def test_bytes_do_not_depend_on_blocks_beyond_one_chunk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = sparse.csr_matrix((rng.random((90, 10_000)) + 0.5).astype(np.float32))
    once = _write_blocks(tmp_path / "a.h5ad", matrix, [])
    assert _write_blocks(tmp_path / "b.h5ad", matrix, [1, 2, 3, 50]) == once
    assert len(once) < matrix.nnz * 8 + (3 << 20)
    back = ad.read_h5ad(tmp_path / "b.h5ad")
    assert (matrix != back.X).nnz == 0


def test_what_is_written_is_canonical(tmp_path: Path) -> None:
    untidy = sparse.csr_matrix(
        (np.array([2.0, 0.0, 1.0, 3.0]), np.array([4, 1, 0, 0]), np.array([0, 2, 4])), shape=(2, 5)
    )
    before = untidy.toarray()
    with CsrWriter(tmp_path / "a.h5ad", list("abcde")) as writer:
        writer.append(untidy)
        writer.finish(pd.DataFrame(index=["x", "y"]))
    with open_h5ad(tmp_path / "a.h5ad") as reader:
        assert reader.num_stored == 2
        assert np.array_equal(next(reader.chunks())[1].toarray(), before)
    assert untidy.nnz == 4


def test_a_file_that_is_not_finished_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    with pytest.raises(RuntimeError, match="finish"), CsrWriter(path, ["a"]):
        pass
    assert not path.exists()
    with pytest.raises(KeyError), CsrWriter(path, ["a"]) as writer:
        writer.append(sparse.csr_matrix(np.ones((2, 1))))
        raise KeyError
    assert not path.exists()


def test_rows_genes_and_names_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    with pytest.raises(DataError, match="gene names repeat"):
        CsrWriter(path, ["a", "a"])
    with pytest.raises(DataError, match="expected rows of 1 genes, got 2"), CsrWriter(path, ["a"]) as writer:
        writer.append(sparse.csr_matrix(np.ones((2, 2))))
    with pytest.raises(DataError, match="expected 2 rows as X has, got 1"), CsrWriter(path, ["a"]) as writer:
        writer.append(sparse.csr_matrix(np.ones((2, 1))))
        writer.finish(pd.DataFrame(index=["x"]))
    with pytest.raises(DataError, match="'x' names two cells"), CsrWriter(path, ["a"]) as writer:
        writer.append(sparse.csr_matrix(np.ones((2, 1))))
        writer.finish(pd.DataFrame(index=["x", "x"]))
    assert not path.exists()


def test_real_cells_read_as_anndata_reads_them(shared_data: Path) -> None:
    path = shared_data / "four_contexts.h5ad"
    _, blocks = _read(path, 10_000)
    expected = ad.read_h5ad(path)
    assert (sparse.vstack(blocks).tocsr() != expected.X).nnz == 0
    with open_h5ad(path) as reader:
        assert reader.genes == tuple(expected.var_names)
        assert reader.obs("perturbation").tolist() == expected.obs["perturbation"].tolist()


def test_what_is_written_can_be_used_as_any_scipy_matrix(tmp_path: Path) -> None:
    with CsrWriter(tmp_path / "a.h5ad", ["A", "B"]) as writer:
        writer.append(sparse.csr_matrix(np.array([[1, 0], [0, 2]], dtype=np.float32)))
        writer.finish(pd.DataFrame(index=["0", "1"]))
    matrix = ad.read_h5ad(tmp_path / "a.h5ad").X
    assert matrix.nonzero()[1].tolist() == [0, 1]
    assert matrix.tocoo().nnz == 2
