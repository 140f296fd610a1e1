"""Counts and log1p are told apart, and what is neither, both or mixed is refused with its place."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from pertcast.errors import DataError
from pertcast.files.scales import Scale, ScaleEvidence, common_scale, log_problem, normalise_log1p


def _counts(seed: int = 0, *, cells: int = 12, genes: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).poisson(4.0, size=(cells, genes)).astype(np.float32)


def _log1p(counts: np.ndarray, target: float = 1e4) -> np.ndarray:
    result: np.ndarray = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * target).astype(np.float32)
    return result


def _evidence(values: np.ndarray, place: str = "a.h5ad") -> ScaleEvidence:
    evidence = ScaleEvidence(place, genes=[f"G{i}" for i in range(values.shape[1])])
    evidence.add(values)
    return evidence


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8])
def test_whole_numbers_are_counts(dtype: type) -> None:
    assert _evidence(_counts().astype(dtype)).verdict() == "counts"


@pytest.mark.parametrize("target", [10.0, 1e4, 1e6])
def test_log1p_of_normalised_counts_is_log1p(target: float) -> None:
    assert _evidence(_log1p(_counts(), target)).verdict() == "log1p"


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.booleans(), st.integers(0, 99))
def test_blocks_and_forms_do_not_matter(sizes: list[int], logged: bool, seed: int) -> None:
    counts = _counts(seed, cells=sum(sizes))
    values = _log1p(counts) if logged else counts
    whole = _evidence(values)
    pieces = ScaleEvidence("a.h5ad")
    start = 0
    for number, size in enumerate(sizes):
        block = sparse.csr_matrix(values[start : start + size])
        if number % 2:
            pieces.add_csr(block, first_cell=start)
        else:
            cells = np.repeat(np.arange(size), np.diff(block.indptr))
            pieces.add(block.data, first_cell=start, cell_of_value=cells, gene_of_value=block.indices)
        start += size
    for name in ("num_whole", "num_fractional", "num_weak", "first_whole", "first_fractional", "max_value"):
        assert getattr(pieces, name) == getattr(whole, name)
    assert pieces.num_empty + pieces.num_whole + pieces.num_fractional + pieces.num_weak <= sum(sizes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0])
def test_an_impossible_value_is_named(bad: float) -> None:
    values = _counts()
    values[7, 2] = bad
    evidence = ScaleEvidence("a.h5ad", genes=[f"G{i}" for i in range(9)])
    evidence.add(values[:5])
    with pytest.raises(
        DataError,
        match=re.escape(f"a.h5ad, cell 7 (from 0), gene 'G2': expected a finite value of 0 or more, got {bad}"),
    ):
        evidence.add(values[5:], first_cell=5)


def test_mixed_cells_are_named_by_row() -> None:
    values = _log1p(_counts())
    values[[3, 8]] = _counts()[[3, 8]]
    with pytest.raises(DataError, match=r"a.h5ad, rows 3, 8: two scales are mixed: 2 of 12 cells hold whole counts"):
        _evidence(values).verdict()
    values = _counts()
    values[5] = _log1p(_counts())[5]
    with pytest.raises(DataError, match=r"rows 5: .*1 of 12 cells hold values with fractions"):
        _evidence(values).verdict()


def test_a_cell_of_one_or_two_whole_values_goes_with_the_others() -> None:
    values = _log1p(_counts())
    values[4] = 0
    values[4, :2] = 2.0
    evidence = _evidence(values)
    assert evidence.verdict() == "log1p"
    assert evidence.num_weak == 1


def test_normalised_without_log1p_is_refused() -> None:
    with pytest.raises(DataError, match="neither whole counts nor log1p") as caught:
        _evidence(np.expm1(_log1p(_counts()))).verdict()
    assert "cell " in caught.value.problems[0].place


@pytest.mark.parametrize(
    ("values", "message"), [(np.eye(4), "every value is 0 or 1"), (np.zeros((3, 3)), "other than 0")]
)
def test_what_fits_both_scales_is_asked_for(values: np.ndarray, message: str) -> None:
    evidence = _evidence(values)
    assert evidence.ambiguous
    with pytest.raises(DataError, match=message):
        evidence.verdict()
    scales: tuple[Scale, ...] = ("counts", "log1p")
    assert all(common_scale([evidence], asked=scale) == scale for scale in scales)
    assert common_scale([_evidence(_counts()), evidence]) == "counts"
    with pytest.raises(DataError, match=message):
        common_scale([_evidence(_log1p(_counts())), evidence])


@pytest.mark.parametrize(("asked", "found"), [("counts", "log1p"), ("log1p", "counts")])
def test_a_config_against_the_evidence_is_an_error(asked: Literal["counts", "log1p"], found: str) -> None:
    values = _counts() if found == "counts" else _log1p(_counts())
    with pytest.raises(DataError, match=rf'expected {asked} \(prepare.scale\).*set prepare.scale = "{found}"'):
        common_scale([_evidence(values)], asked=asked)


def test_files_on_two_scales_are_named() -> None:
    with pytest.raises(DataError) as caught:
        common_scale([_evidence(_counts(), "a.h5ad"), _evidence(_log1p(_counts()), "b.h5ad")])
    places = {problem.place: problem.message for problem in caught.value.problems}
    assert places == {"a.h5ad": "is on the scale counts", "b.h5ad": "is on the scale log1p"}


@settings(deadline=None)
@given(st.integers(0, 999), st.floats(1.0, 1e6))
def test_normalising_is_the_formula(seed: int, target: float) -> None:
    counts = _counts(seed)
    counts[2] = 0
    found = normalise_log1p(sparse.csr_matrix(counts), counts.sum(1), target)
    expected = np.zeros_like(counts, dtype=np.float64)
    for cell, row in enumerate(counts.astype(np.float64)):
        for gene, count in enumerate(row):
            expected[cell, gene] = np.log1p(count * target / row.sum()) if count else 0.0
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), expected, rtol=2e-6)


def test_normalising_does_not_depend_on_the_block() -> None:
    counts = sparse.csr_matrix(_counts(cells=50, genes=33))
    totals = np.asarray(counts.sum(axis=1)).ravel()
    whole = normalise_log1p(counts, totals, 1e4).toarray()
    rows = [normalise_log1p(counts[i], totals[i : i + 1], 1e4).toarray() for i in range(50)]
    assert np.array_equal(np.concatenate(rows), whole)


def _varied(seed: int = 0) -> np.ndarray:
    """Counts of cells with different totals."""
    rng = np.random.default_rng(seed)
    counts: np.ndarray = rng.poisson(rng.gamma(1.0, 5.0, size=30) * rng.uniform(0.5, 3.0, size=(40, 1)))
    return counts.astype(np.float64)


def _normal(target: float) -> np.ndarray:
    counts = _varied()
    normal: np.ndarray = counts / counts.sum(1, keepdims=True) * target
    return normal


@pytest.mark.parametrize(
    ("values", "base", "message"),
    [
        (np.log2(1 + _normal(1e4)), None, r"log2\(x \+ 1\): undone so, every cell has the same total"),
        (np.log10(1 + _normal(1e4)), None, r"log10\(x \+ 1\): undone so"),
        (np.log1p(np.log1p(_normal(1e4))), None, "log1p taken twice"),
        (_normal(10.0), None, "not logged"),
        (_normal(1e4), None, "not logged"),
        (np.log1p(_normal(1e4)), 2, r"natural log1p \(uns\['log1p'\]\['base'\] is 2\)"),
        (np.log1p(_varied()), None, "log1p of whole counts that were never normalised"),
        (np.log2(1 + _varied()), 2, "log1p of whole counts that were never normalised"),
    ],
)
def test_values_of_another_logarithm_are_named(values: np.ndarray, base: float | None, message: str) -> None:
    problem = log_problem(sparse.csr_matrix(values.astype(np.float32)), "a.h5ad", base)
    assert problem is not None
    assert re.search(message, problem.message)


@pytest.mark.parametrize(
    ("values", "base"),
    [
        (np.log1p(_normal(1e4)), None),
        (np.log1p(_normal(1e6)), None),
        (np.log2(1 + _normal(1e4)), 2),
        (np.log1p(_normal(1e4))[:, :20], None),  # of some genes, so that no total is the same
        (_varied(), None),
        (np.where(np.eye(40, 30) > 0, 0.5, _varied()), None),
        (np.zeros((3, 3)), None),
    ],
)
def test_without_clear_evidence_of_another_logarithm_nothing_is_said(values: np.ndarray, base: float | None) -> None:
    assert log_problem(sparse.csr_matrix(values.astype(np.float32)), "a.h5ad", base) is None
