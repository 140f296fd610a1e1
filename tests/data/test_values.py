"""Stored values: the copy of the highly variable genes holds what all genes hold, and is read in their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

import pertcast.data.store_arrays
from pertcast.config import Experiment
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.data.store_arrays import StoredValues, worth_a_copy, write_hvg_values
from pertcast.errors import CheckpointError
from pertcast.files.h5ad import RangeFile

Builder = Callable[..., Path]


def _store(path: Path, out: Path, *, num_hvgs: int = 6) -> Path:
    sections: dict[str, Any] = {
        "datasets": {"d": str(path)},
        "training": {"d": "train"},
        "columns": {"cell_type": "cell_type"},
        "prepare": {"num_hvgs": num_hvgs},
    }
    return prepare(Experiment.model_validate(sections, strict=False), out)


@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_the_copy_gives_what_all_genes_give(small_h5ad: Builder, tmp_path: Path, scale: str) -> None:
    store = Store.open(_store(small_h5ad(scale=scale), tmp_path / "store"))
    rows = np.array([5, 0, 95, 5, 17])
    np.testing.assert_array_equal(store.log1p(rows, genes=store.hvg), store.log1p(rows)[:, store.hvg])
    backwards = store.hvg[::-1].copy()
    np.testing.assert_array_equal(store.log1p(rows, genes=backwards), store.log1p(rows)[:, backwards])


def test_hvgs_are_read_at_the_cost_of_their_own_bytes(
    small_h5ad: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(_store(small_h5ad(), tmp_path / "store"))
    rows = np.arange(96)
    expected = int((store.log1p(rows)[:, store.hvg] != 0).sum())
    read: list[int] = []
    write = StoredValues.write_log1p

    def counted(self: StoredValues, rows: np.ndarray, *arguments: Any, **named: Any) -> None:
        read.append(self.read(rows).nnz)
        write(self, rows, *arguments, **named)

    monkeypatch.setattr(StoredValues, "write_log1p", counted)
    store.log1p(rows, genes=store.hvg)
    assert read == [expected]


@pytest.mark.parametrize("factor", [1, 1000, 70_000])
def test_dense_values_are_those_of_csr_to_the_bit(small_h5ad: Builder, tmp_path: Path, factor: int) -> None:
    """Small counts are looked up and large ones computed, of all genes, the variable ones, and any others."""
    path = small_h5ad()
    cells = ad.read_h5ad(path)
    cells.X = cells.X.astype(np.float32) * factor
    cells.write_h5ad(path)
    store = Store.open(_store(path, tmp_path / "store"))
    rows = np.array([7, 0, 95, 7, 33])
    expected = store.csr(rows).toarray()
    assert expected.max() > 0
    np.testing.assert_array_equal(store.log1p(rows), expected)
    for genes in (store.hvg, store.hvg[::-1].copy(), np.array([19, 0, 3])):
        np.testing.assert_array_equal(store.log1p(rows, genes=genes), expected[:, genes])
    assert store.log1p(np.zeros(0, dtype=np.int64)).shape == (0, 20)


def test_a_row_is_announced_to_the_disk_once_where_the_store_fits_into_memory(
    small_h5ad: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[int] = []
    monkeypatch.setattr(RangeFile, "announce", lambda self, starts, stops: announced.append(len(starts)))
    for memory, expected in ((1 << 40, [3, 3, 1, 1]), (0, [3, 3, 2, 2])):
        monkeypatch.setattr(pertcast.data.store_arrays, "_memory_bytes", lambda memory=memory: memory)
        store = Store.open(_store(small_h5ad(), tmp_path / "store"))
        announced.clear()
        store.csr(np.array([1, 2, 3]))
        store.csr(np.array([3, 4]))
        assert announced == expected


def test_blocks_of_any_size_give_the_same_files(
    small_h5ad: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _store(small_h5ad(), tmp_path / "whole")
    monkeypatch.setattr(pertcast.data.store_arrays, "_HVG_BLOCK_VALUES", 25)
    blocks = _store(small_h5ad(), tmp_path / "blocks")
    for name in ("hvg_indptr.npy", "hvg_indices.npy", "hvg_data.npy"):
        assert (whole / name).read_bytes() == (blocks / name).read_bytes()


def test_no_copy_where_hvgs_are_half_of_the_genes_or_more(small_h5ad: Builder, tmp_path: Path) -> None:
    assert not worth_a_copy(0, 10)
    assert worth_a_copy(5, 10)
    assert not worth_a_copy(6, 10)
    path = _store(small_h5ad(), tmp_path / "store", num_hvgs=1000)
    assert not list(path.glob("hvg_*"))
    store = Store.open(path)
    np.testing.assert_array_equal(store.log1p(np.arange(9), genes=store.hvg), store.log1p(np.arange(9))[:, store.hvg])


def test_genes_that_no_cell_has(tmp_path: Path) -> None:
    for name, values in (("indptr", [0, 1, 1]), ("indices", [2]), ("data", [7])):
        np.save(tmp_path / f"{name}.npy", np.array(values, dtype=np.int64 if name == "indptr" else np.uint16))
    done: list[int] = []
    write_hvg_values(tmp_path, np.array([0, 3]), num_genes=6, advance=lambda num, detail="": done.append(num))
    assert sum(done) == 2
    stored = StoredValues(tmp_path, num_genes=2, prefix="hvg_")
    assert (len(stored), stored.num_values) == (2, 0)
    assert stored.read(np.array([1, 0])).toarray().tolist() == [[0, 0], [0, 0]]


def test_a_store_without_a_copy_still_opens(small_h5ad: Builder, tmp_path: Path) -> None:
    path = _store(small_h5ad(), tmp_path / "store")
    expected = Store.open(path).log1p(np.arange(96), genes=Store.open(path).hvg)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("hvg_indptr.npy", "hvg_indices.npy", "hvg_data.npy"):
        (path / name).unlink()
        del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    store = Store.open(path)
    np.testing.assert_array_equal(store.log1p(np.arange(96), genes=store.hvg), expected)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_copy_is_an_error(small_h5ad: Builder, tmp_path: Path, damage: str) -> None:
    path = _store(small_h5ad(), tmp_path / "store")
    if damage == "missing":
        (path / "hvg_data.npy").unlink()
    else:
        np.save(path / "hvg_data.npy", np.load(path / "hvg_data.npy")[:-1])
    with pytest.raises(CheckpointError, match=r"hvg_data\.npy: missing or damaged"):
        Store.open(path)
