"""Ranges of an array on disk come back as slices of it would, in any order; a file cut short is an error of ours."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.store import ALIGNMENT_BYTES, Store
from pertcast.errors import CheckpointError
from pertcast.files.h5ad import RangeFile
from workspace import make_workspace

VALUES = np.random.default_rng(0).integers(0, 1 << 16, 500).astype(np.uint16)


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranges") / "a.npy"
    np.save(path, VALUES)
    return path


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)).map(sorted), max_size=20))
def test_ranges_are_slices(array: Path, ranges: list[list[int]]) -> None:
    starts, stops = (np.array([pair[end] for pair in ranges], dtype=np.int64) for end in (0, 1))
    expected = np.concatenate([VALUES[:0], *(VALUES[start:stop] for start, stop in ranges)])
    found = RangeFile(array).gather(starts, stops)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_a_file_has_the_length_of_its_array(array: Path) -> None:
    assert len(RangeFile(array)) == 500
    np.save(array.with_name("two.npy"), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="expected one dimension, got 2"):
        RangeFile(array.with_name("two.npy"))


def test_descriptors_are_closed(array: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("this system does not list them")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        RangeFile(array)
    assert len(list(descriptors.iterdir())) == before


@pytest.fixture
def store(tmp_path: Path) -> Store:
    workspace = make_workspace(tmp_path / "w")
    return Store.open(prepare(load_experiment(workspace.experiment), tmp_path / "store"))


def test_a_store_cut_short_after_it_was_opened_is_an_error(store: Store) -> None:
    with (store.path / "data.npy").open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(CheckpointError, match=r"cannot be read .* run `pertcast prepare` again"):
        store.csr(np.arange(store.num_cells))


def test_dense_cells_are_aligned_and_a_pickled_store_reads_the_same(store: Store) -> None:
    again = pickle.loads(pickle.dumps(store))
    for number in range(1, 12):
        dense = store.log1p(np.arange(number), genes=np.arange(7))
        assert dense.ctypes.data % ALIGNMENT_BYTES == 0
        assert dense.flags.c_contiguous
        assert np.array_equal(dense, again.csr(np.arange(number)).toarray()[:, :7])
