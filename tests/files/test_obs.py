"""What a hostile h5ad declares is refused before it is allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pertcast.errors import DataError
from pertcast.files.h5ad import open_h5ad
from pertcast.files.obs import require_plausible
from pertcast.submission.check import check

Builder = Callable[..., Path]
HUGE = 10**13


def _replace(file: Any, name: str, *, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...] = (1000,)) -> None:
    """Put a dataset without a stored byte in the place of another."""
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, shape=shape, dtype=dtype, chunks=chunks).attrs.update(attributes)


@pytest.mark.parametrize("name", ["X/data", "X/indices", "X/indptr", "var/_index", "obs/_index"])
def test_more_values_than_the_file_can_hold_are_refused(small_h5ad: Builder, name: str) -> None:
    path = small_h5ad()
    with h5py.File(path, "r+") as file:
        _replace(file, name, shape=(HUGE,), dtype="i4")
    with pytest.raises(DataError, match=r"more than a file of .* bytes can hold|10000000000000 names for 96 rows"):
        _read_all(path)


def _read_all(path: Path) -> None:
    with open_h5ad(path) as reader:
        for column in reader.obs_columns:
            reader.obs(column)
        reader.obs_names()
        for _ in reader.chunks():
            pass


def test_a_column_or_an_embedding_larger_than_the_file_is_refused(small_h5ad: Builder) -> None:
    path = small_h5ad()
    with h5py.File(path, "r+") as file:
        _replace(file, "obs/batch/codes", shape=(HUGE,), dtype="i1")
        file.create_dataset("obsm/X_pca", shape=(96, HUGE), dtype="f4", chunks=(1, 1000))
    with open_h5ad(path) as reader:
        with pytest.raises(DataError, match=r"obs\['batch'\].*can hold"):
            reader.obs("batch")
        with pytest.raises(DataError, match=r"obsm\['X_pca'\].*can hold"):
            reader.embedding("X_pca", 0, 1)


def test_a_dense_matrix_larger_than_the_file_is_refused(small_h5ad: Builder) -> None:
    path = small_h5ad(layout="dense")
    with h5py.File(path, "r+") as file:
        _replace(file, "X", shape=(HUGE, 20), dtype="f4", chunks=(1000, 20))
    with pytest.raises(DataError, match="can hold"):
        _read_all(path)


def test_a_chunk_too_large_for_memory_is_refused(small_h5ad: Builder) -> None:
    path = small_h5ad(layout="dense")
    with h5py.File(path, "r+") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        made = file.create_dataset("X", shape=(96, 20), maxshape=(None, 20), dtype="f4", chunks=(1 << 24, 20))
        made.attrs.update(attributes)
    with pytest.raises(DataError, match="chunks of"):
        _read_all(path)


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_shape_that_is_only_declared_is_an_error_of_the_check(
    small_h5ad: Builder, tmp_path: Path, layout: str
) -> None:
    path = small_h5ad(layout=layout)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = np.array([10**15, 20])
    (tmp_path / "genes.csv").write_text("".join(f"G{number}\n" for number in range(20)))
    report = check(path, season="vcc2025", genes=tmp_path / "genes.csv", rules={"num_genes": 20})
    assert not report.ok
    assert "96 names for 1000000000000000 rows" in str(report.problems[0])


def test_what_a_file_truly_holds_is_accepted(tmp_path: Path) -> None:
    values = np.zeros((2_000, 50_000), dtype=np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=values, chunks=(200, 50_000), compression="gzip", compression_opts=9)
    assert values.nbytes > 500 * (tmp_path / "a.h5").stat().st_size
    with h5py.File(tmp_path / "a.h5", "r") as file:
        require_plausible(file["x"])
