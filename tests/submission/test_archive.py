"""A slim prediction is compressed as it lies; any other form is rewritten to the same one; both read back equal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

from conftest import SMALL_GENES
from pertcast.errors import SubmissionError
from pertcast.files.artefacts import hash_file, read_manifest
from pertcast.files.h5ad import open_h5ad
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.progress import Advance
from pertcast.seasons import SEASONS
from pertcast.seasons import season as season_of
from pertcast.submission import pack as packing
from pertcast.submission.archive import estimate_packed
from pertcast.submission.check.values import check_values
from pertcast.submission.pack import PackOptions, pack, unpack

RULES = {"num_genes": len(SMALL_GENES)}
CELLS = 60


@pytest.fixture
def genes(tmp_path: Path) -> Path:
    path = tmp_path / "genes.csv"
    path.write_text("".join(f"{name}\n" for name in SMALL_GENES))
    return path


def values(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (CELLS, len(SMALL_GENES))
    found: np.ndarray = rng.gamma(1.0, 1.0, shape) * (rng.random(shape) < 0.5) + (np.arange(20) == 0) * 0.5
    return found.astype(np.float32)


def write_slim(path: Path) -> Path:
    labels = pd.Categorical(["non-targeting", "G1", "G2"] * (CELLS // 3))
    with CsrWriter(path, SMALL_GENES) as writer:
        writer.append(sparse.csr_matrix(values()))
        writer.finish(pd.DataFrame({"target_gene": labels}, index=pd.RangeIndex(CELLS).astype(str)))
    return path


def unsorted(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for row in range(CELLS):
            part = slice(file["X/indptr"][row], file["X/indptr"][row + 1])
            for name in ("data", "indices"):
                file["X"][name][part] = file["X"][name][part][::-1]


def changed(change: Callable[[ad.AnnData], object]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        cells = ad.read_h5ad(path)
        other = change(cells)
        (other if isinstance(other, ad.AnnData) else cells).write_h5ad(path)

    return rewrite


def set_matrix(cells: ad.AnnData, matrix: Any) -> None:
    cells.X = matrix


def gzipped(path: Path) -> None:
    ad.read_h5ad(path).write_h5ad(path, compression="gzip")


def wide_indices(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        indices = file["X/indices"][()]
        del file["X/indices"]
        file["X/indices"] = indices.astype(np.int64)


FORMS: dict[str, Callable[[Path], None]] = {
    "unsorted": unsorted,
    "gzipped": gzipped,
    "indices of 64 bits": wide_indices,
    "dense": changed(lambda cells: set_matrix(cells, cells.X.toarray())),
    "csc": changed(lambda cells: set_matrix(cells, cells.X.tocsc())),
    "float64": changed(lambda cells: set_matrix(cells, cells.X.astype(np.float64))),
    "genes shuffled": changed(lambda cells: cells[:, np.random.default_rng(1).permutation(20)].copy()),
    "more obs": changed(lambda cells: cells.obs.insert(0, "n", 1.0)),
    "more layers": changed(lambda cells: cells.layers.update({"x": cells.X})),
    "other names": changed(lambda cells: setattr(cells, "obs_names", [f"c{i}" for i in range(CELLS)])),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_a_prediction_is_packed_as_the_slim_one(tmp_path: Path, genes: Path, form: str) -> None:
    slim = write_slim(tmp_path / "slim.h5ad")
    other = write_slim(tmp_path / "other.h5ad")
    FORMS[form](other)
    vcc = pack(slim, tmp_path / "slim.vcc", season=season_of("vcc2025", RULES), genes=genes)
    same = pack(other, tmp_path / "other.vcc", season=season_of("vcc2025", RULES), genes=genes)
    assert vcc.read_bytes() == same.read_bytes()
    back = ad.read_h5ad(unpack(same, tmp_path / "back.h5ad"))
    assert np.array_equal(back.X.toarray(), values())
    assert back.var_names.tolist() == list(SMALL_GENES)


def test_a_slim_prediction_is_compressed_as_it_lies(
    tmp_path: Path, genes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slim = write_slim(tmp_path / "slim.h5ad")
    monkeypatch.setattr(packing, "rewrite_canonical", None)
    vcc = pack(slim, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    assert unpack(vcc, tmp_path / "back.h5ad").read_bytes() == slim.read_bytes()
    manifest = read_manifest(vcc)
    assert manifest.inputs["prediction"] == hash_file(slim)
    assert manifest.files == {"p.vcc": hash_file(vcc)}


def test_a_level_that_zstd_does_not_have_is_refused_and_others_change_the_size_alone(
    tmp_path: Path, genes: Path
) -> None:
    slim = write_slim(tmp_path / "slim.h5ad")
    with pytest.raises(SubmissionError, match="level 25: expected 1 to 19"):
        pack(slim, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes, options=PackOptions(level=25))
    packed = pack(
        slim, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes, options=PackOptions(level=19)
    )
    assert unpack(packed, tmp_path / "back.h5ad").read_bytes() == slim.read_bytes()


def test_the_size_of_an_archive_is_estimated_from_samples(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(os.urandom(3_000_000) + bytes(3_000_000))
    assert 2_500_000 < estimate_packed(path, level=3) < 3_600_000


def plain_facts(dense: np.ndarray) -> dict[str, object]:
    """What the check says of cells, one cell at a time."""
    sums = [float(row.sum(dtype=np.float64)) for row in dense]
    return {
        "max_value": float(dense.max()),
        "max_cell_sum": pytest.approx(max(sums), rel=1e-5),
        "median_cell_sum": pytest.approx(float(np.median(sums)), rel=1e-5),
        "zero_cells": sum(not row.any() for row in dense),
        "nonzero_values": int((dense != 0).sum()),
    }


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["counts", "log1p", "late fraction"]), st.integers(1, 12))
def test_facts_of_values_equal_those_of_a_slow_twin(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.gamma(0.5, 2.0, (rows, 40))).astype(np.float32)
    dense[0, :4] = 3
    if kind == "log1p":
        dense = np.log1p(dense / 3).astype(np.float32)
    elif kind == "late fraction":
        dense[:, :39] = 2
        dense[:, 39] = 0.5
    path = tmp_path_factory.mktemp("twin") / "p.h5ad"
    with CsrWriter(path, [f"G{number}" for number in range(40)]) as writer:
        writer.append(sparse.csr_matrix(dense))
        writer.finish(pd.DataFrame(index=pd.RangeIndex(rows).astype(str)))
    with open_h5ad(path) as reader:
        from pertcast.progress import SILENT

        facts = check_values(reader, SEASONS["vcc2025"], SILENT).facts
    assert {name: facts[name] for name in plain_facts(dense)} == plain_facts(dense)
    assert facts["scale"] == ("counts" if kind == "counts" else "log1p")


class Tasks:
    """A progress that keeps what was done, in order."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        self.labels.append(label)
        yield lambda amount, detail="": None

    def note(self, text: str) -> None: ...

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...


@pytest.mark.parametrize("form", ["slim", "wide"])
def test_pack_checks_first_and_rewrites_only_what_is_not_in_the_packed_form(
    tmp_path: Path, genes: Path, form: str
) -> None:
    path, tasks = write_slim(tmp_path / "p.h5ad"), Tasks()
    if form == "wide":
        FORMS["float64"](path)
    pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes, progress=tasks)
    assert tasks.labels[0] == "check"
    assert tasks.labels[-2:] == ["pack", "read back"]
    assert ("slim down" in tasks.labels) == (form == "wide")
    assert len(tasks.labels) == 3 + (form == "wide")
    # a second time nothing is read but the hashes
    again = Tasks()
    pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes, progress=again)
    assert again.labels == []


def test_a_prediction_that_is_refused_is_neither_rewritten_nor_compressed(tmp_path: Path, genes: Path) -> None:
    path, tasks = write_slim(tmp_path / "p.h5ad"), Tasks()
    with h5py.File(path, "r+") as file:
        file["X/data"][0] = np.nan
    with pytest.raises(SubmissionError, match="not packed, "):
        pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes, progress=tasks)
    assert tasks.labels == ["check"]
    assert not (tmp_path / "p.vcc").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["genes.csv", "p.h5ad"]
