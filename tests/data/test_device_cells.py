"""Stored cells on a device: every kernel gives what the store gives, and buffers are not filled too early."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from pertcast.data.device_cells import PinnedBuffers, StoredCells
from pertcast.data.inputs import CellSource
from pertcast.data.store import Store
from pertcast.errors import CheckpointError
from workspace import Workspace, prepared_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepared_workspace(tmp_path_factory.mktemp("cells") / "w")


COUNTS: dict[Any, int] = {np.uint8: 255, np.uint16: 65_535, np.uint32: 1 << 20, np.float32: 9}


def stored(num_cells: int, num_genes: int, kind: type, seed: int) -> tuple[StoredCells, sparse.csr_matrix]:
    random = np.random.default_rng(seed)
    cells: Any = sparse.random(num_cells, num_genes, density=0.4, format="csr", random_state=seed)
    cells.data = random.integers(1, COUNTS[kind], size=cells.nnz, endpoint=True).astype(kind)
    factors = None if kind is np.float32 else random.uniform(1e-3, 2, size=num_cells).astype(np.float32)
    columns = cells.indices.astype(np.uint16 if seed % 2 else np.int32)
    return StoredCells.of((cells.indptr.astype(np.int64), columns, cells.data), factors), cells


def expected(cells: StoredCells, matrix: sparse.csr_matrix, rows: list[int]) -> np.ndarray:
    dense: np.ndarray = matrix[rows].toarray().astype(np.float32)
    if cells.factors is None:
        return dense
    result: np.ndarray = np.log1p(dense * cells.factors.numpy()[rows][:, None])
    return result


@settings(deadline=None)  # the first call compiles
@given(
    kind=st.sampled_from([np.uint8, np.uint16, np.uint32, np.float32]),
    rows=st.lists(st.integers(0, 6), max_size=9),
    chosen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_both_kernels_give_the_log1p_of_normalised_counts(kind: type, rows: list[int], chosen: bool, seed: int) -> None:
    cells, matrix = stored(7, 12, kind, seed)
    genes = np.random.default_rng(seed).permutation(12)[:5]
    positions_G, width = None, 12
    wanted = expected(cells, matrix, rows)
    if chosen:
        positions = np.full(12, -1, dtype=np.int64)
        positions[genes] = np.arange(5)
        positions_G, width, wanted = torch.from_numpy(positions), 5, wanted[:, genes]
    rows_R = torch.tensor(rows, dtype=torch.int64)
    found_RG = cells.dense(rows_R, width, positions_G=positions_G)
    np.testing.assert_array_equal(found_RG.numpy(), wanted)
    plain_RG = torch.zeros_like(found_RG)
    cells.write_with_torch(rows_R, plain_RG, positions_G)
    np.testing.assert_allclose(plain_RG.numpy(), wanted, rtol=3e-7, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.float32])
def test_the_kernel_of_the_gpu_gives_the_same(kind: type) -> None:
    cells, matrix = stored(300, 2000, kind, 1)
    rows = np.random.default_rng(0).integers(0, 300, size=500)
    found = cells.to("cuda").dense(torch.from_numpy(rows).to("cuda"), 2000)
    np.testing.assert_allclose(found.cpu().numpy(), expected(cells, matrix, rows.tolist()), rtol=2e-6, atol=1e-7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.float32])
def test_the_kernel_gives_the_same_in_tritons_interpreter(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    from pertcast.data.gather_kernel import gather

    cells, matrix = stored(7, 1500, kind, 1)
    rows, genes = [6, 0, 3, 3], np.array([7, 1200, 3])
    positions = np.full(1500, -1, dtype=np.int64)
    positions[genes] = np.arange(3)
    wanted = expected(cells, matrix, rows)
    for width, chosen, places in ((1500, slice(None), None), (3, genes, torch.from_numpy(positions))):
        found = torch.zeros(len(rows), width)
        gather(cells, torch.tensor(rows), found, places)
        np.testing.assert_allclose(found.numpy(), wanted[:, chosen], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("genes", [None, "hvg", "others"])
def test_cells_get_to_a_device_in_three_ways_with_the_same_bits(workspace: Workspace, genes: str | None) -> None:
    store = Store.open(workspace.folder / "store")
    chosen = {"hvg": store.hvg, "others": np.array([5, 1, 3]), None: None}[genes]
    rows = np.random.default_rng(0).integers(0, store.num_cells, size=40)
    found = []
    for way in ("dense", "packed", "resident"):
        source = CellSource(store, genes=chosen)
        source.place(torch.device("cpu"), way)
        found.append(source.dense(torch.from_numpy(rows), source.fetch(rows)))
    np.testing.assert_array_equal(found[0].numpy(), store.log1p(rows, genes=chosen))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_view_with_other_highly_variable_genes_reads_those(workspace: Workspace) -> None:
    """As `adapt` sees a new line's store: with the highly variable genes of the run."""
    store = Store.open(workspace.folder / "store")
    rows = np.arange(20)
    others = np.setdiff1d(np.arange(len(store.genes)), store.hvg)[: len(store.hvg)]
    view = replace(store, hvg=others)
    source = CellSource(view, genes=view.hvg)
    for found in (view.log1p(rows, genes=view.hvg), source.dense(torch.from_numpy(rows), source.fetch(rows)).numpy()):
        np.testing.assert_array_equal(found, store.log1p(rows)[:, others])


def test_a_store_that_became_shorter_is_an_error_before_cells_go_to_the_device(
    workspace: Workspace, tmp_path: Path
) -> None:
    store = Store.open(Path(shutil.copytree(workspace.folder / "store", tmp_path / "store")))
    with (tmp_path / "store" / "data.npy").open("r+b") as stream:
        stream.truncate(200)
    for way in ("packed", "resident"):
        source = CellSource(store)
        with pytest.raises(CheckpointError, match="prepare"):
            source.place(torch.device("cpu"), way)
            source.fetch(np.arange(3))


def test_buffers_of_a_batch_are_not_filled_again_before_the_others_had_their_turn() -> None:
    buffers = PinnedBuffers(3)
    turns = [buffers.take() for _ in range(7)]
    assert [turns[i] == turns[i + 3] for i in range(4)] == [True] * 4
    first = buffers.array(turns[0], "values", 5, np.dtype(np.uint16))
    first[:] = 7
    other = buffers.array(turns[1], "values", 5, np.dtype(np.uint16))
    other[:] = 8
    assert first.tolist() == [7] * 5
    assert buffers.array(turns[0], "values", 5, np.dtype(np.uint16)).tolist() == [7] * 5
    assert len(buffers.array(turns[0], "values", 900, np.dtype(np.int64))) == 900
