"""Differential expression: against a slow twin, SciPy, and pdex."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import false_discovery_control, mannwhitneyu

from pertcast.stats.de import adjust_fdr, differential_expression, log2_fold_changes, rank_sum
from pertcast.stats.groups import group_cells, group_means

Cells = NDArray[np.floating]


def draw_cells(seed: int, *, num_cells: int = 60, num_genes: int = 25, rate: float = 1.0) -> Cells:
    """Draw sparse log1p values; the first gene is never seen, the second is the same in every cell."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1.0, rate, size=num_genes), size=(num_cells, num_genes))
    counts[:, 0], counts[:, 1] = 0, 2
    return np.log1p(counts).astype(np.float32)


def statistic_by_pairs(ours: Cells, theirs: Cells) -> NDArray[np.float64]:
    """Count, gene by gene, the pairs of cells in which ours is above theirs, ties as halves."""
    return np.array(
        [
            sum(float(a > b) + 0.5 * float(a == b) for a in ours[:, gene] for b in theirs[:, gene])
            for gene in range(ours.shape[1])
        ]
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threads", [1, 3])
def test_the_rank_sum_test_is_what_it_says(seed: int, threads: int) -> None:
    log1p, codes = draw_cells(seed), np.random.default_rng(seed).integers(0, 3, size=60)
    groups = group_cells(log1p, codes)
    p_value, statistic = rank_sum(groups.select([1, 2]), groups.select([0]), threads=threads)
    for row, code in enumerate((1, 2)):
        ours, theirs = log1p[codes == code].astype(np.float64), log1p[codes == 0].astype(np.float64)
        np.testing.assert_array_equal(statistic[row], statistic_by_pairs(ours, theirs))
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = mannwhitneyu(ours, theirs, axis=0, method="asymptotic").pvalue
        assert (p_value[row, :2] == 1).all()  # constant genes
        np.testing.assert_allclose(p_value[row, 2:], np.where(np.isnan(expected), 1, expected)[2:], rtol=1e-10)


@settings(deadline=None)  # the first call compiles
@given(seed=st.integers(0, 2**32), rate=st.sampled_from([0.05, 1.0, 30.0]))
def test_swapping_the_sides_mirrors_the_statistic_and_keeps_the_p_value(seed: int, rate: float) -> None:
    log1p, codes = draw_cells(seed, num_cells=20, num_genes=6, rate=rate), np.arange(20) % 2
    groups = group_cells(log1p, codes)
    there, back = rank_sum(groups.select([0]), groups.select([1])), rank_sum(groups.select([1]), groups.select([0]))
    np.testing.assert_allclose(there[0], back[0], rtol=1e-12)
    np.testing.assert_array_equal(there[1] + back[1], np.full((1, 6), 100.0))
    assert ((there[0] >= 0) & (there[0] <= 1)).all()


def test_layouts_explicit_zeros_and_cells_of_no_group_change_nothing() -> None:
    log1p, codes = draw_cells(5), np.arange(60) % 4 - 1
    expected = group_cells(log1p, codes)
    stored = sparse.csr_matrix(log1p)
    stored.data[::7] = 0
    zeroed = stored.toarray()
    for layout in (stored, stored.tocsc(), sparse.coo_matrix(stored)):
        groups, plain = group_cells(layout, codes), group_cells(zeroed, codes)
        for ours, theirs in zip(groups, plain, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert expected.sizes.tolist() == [15, 15, 15]
    exact, _ = group_means(expected)
    np.testing.assert_allclose(exact[1], log1p[codes == 1].mean(axis=0, dtype=np.float64), rtol=1e-12)


def test_an_empty_group_has_nothing_to_say() -> None:
    groups = group_cells(draw_cells(1), np.repeat([0, 2], 30))
    table = differential_expression(groups.select([1]), groups.select([0]))
    assert (table.p_value == 1).all()
    assert (table.fdr == 1).all()


def test_values_that_the_test_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        group_cells(np.array([[-1.0, 2.0]]), np.array([0]))
    with pytest.raises(ValueError, match="not NaN"):
        group_cells(np.array([[np.nan, 2.0]]), np.array([0]))
    with pytest.raises(ValueError, match="one code"):
        group_cells(np.ones((2, 2)), np.array([0]))


def test_fold_changes_are_of_geometric_means_and_infinite_against_nothing() -> None:
    means = np.log1p(np.array([[3.0, 0.0, 2.0, 0.0]]))
    np.testing.assert_allclose(
        log2_fold_changes(means, np.log1p(np.array([6.0, 0.0, 0.0, 1.0])))[0], [-1, 0, np.inf, -np.inf]
    )


@given(st.lists(st.lists(st.floats(0, 1), min_size=7, max_size=7), min_size=1, max_size=4))
def test_adjusted_p_values_are_scipys(p_values: list[list[float]]) -> None:
    rows = np.array(p_values)
    np.testing.assert_array_equal(adjust_fdr(rows), np.stack([false_discovery_control(row) for row in rows]))


def compare_with_pdex(log1p: Cells, labels: NDArray[np.str_], control: str, *, dense: bool) -> None:
    pdex = pytest.importorskip("pdex").pdex
    logging.getLogger("pdex").setLevel(logging.ERROR)
    names, codes = np.unique(labels, return_inverse=True)
    obs = pd.DataFrame({"label": pd.Categorical(labels)}, index=[f"cell{row}" for row in range(len(labels))])
    var = pd.DataFrame(index=[f"gene{column}" for column in range(log1p.shape[1])])
    cells = ad.AnnData(log1p if dense else sparse.csr_matrix(log1p), obs=obs, var=var)
    frame = pdex(cells, groupby="label", reference=control, is_log1p=True, epsilon=0.0, as_pandas=True)
    groups, rest = group_cells(log1p, codes), np.flatnonzero(names != control)
    table = differential_expression(
        groups.select(rest), groups.select(np.flatnonzero(names == control)), from_dense=dense, threads=2
    )
    theirs = {name: frame[name].to_numpy().reshape(table.fdr.shape) for name in ("p_value", "fdr", "log2_fold_change")}
    np.testing.assert_allclose(np.log10(table.p_value), np.log10(theirs["p_value"]), atol=1e-9)
    np.testing.assert_array_equal(table.fdr < 0.05, theirs["fdr"] < 0.05)
    np.testing.assert_array_equal(table.log2_fold_change.astype("f4"), theirs["log2_fold_change"].astype("f4"))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("target_sum", [None, 5000.0])
def test_real_cells_have_the_statistics_of_pdex(shared_data: Path, dense: bool, target_sum: float | None) -> None:
    cells = ad.read_h5ad(shared_data / "H1-VCC-2025-training.h5ad")
    counts = cells.X.toarray().astype(np.float32)
    factors = 1.0 if target_sum is None else target_sum / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    log1p: Cells = np.log1p(counts * factors).astype(np.float32)
    compare_with_pdex(log1p, cells.obs["target_gene"].to_numpy(str), "non-targeting", dense=dense)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_constant_genes_and_infinite_fold_changes_are_pdexs(dtype: type) -> None:
    log1p: Cells = draw_cells(11, num_cells=120, num_genes=200, rate=0.3).astype(dtype)
    labels = np.array(["control", "A", "B", "C"])[np.arange(120) % 4]
    log1p[labels == "A", 30:60] += 1  # genes that the control hardly has
    log1p[labels == "control", 30:40] = 0
    compare_with_pdex(log1p, labels, "control", dense=False)
