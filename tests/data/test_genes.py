"""Highly variable genes: moments in blocks are the moments; the ranking is scanpy's."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from pertcast.data.genes import Moments, choose_hvgs, normalised_dispersion


def _normalised(seed: int = 0, *, cells: int = 120, genes: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.6, 4.0, size=genes) * rng.gamma(3.0, 0.4, size=(cells, genes))
    counts = rng.poisson(rate).astype(np.float64)
    counts[:, 5] = 0
    result: np.ndarray = counts / counts.sum(1, keepdims=True) * 1e4
    return result


def test_moments_in_blocks_are_the_moments() -> None:
    values = _normalised()
    moments = Moments(np.full(values.shape[1], len(values)))
    for part in np.array_split(values, 7):
        block = sparse.csr_matrix(part)
        moments.add(block)
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, values.var(0, ddof=1), rtol=1e-9, atol=1e-9)


def test_ranking_is_scanpys() -> None:
    scanpy = pytest.importorskip("scanpy")
    values = _normalised()
    data = ad.AnnData(sparse.csr_matrix(np.log1p(values)))
    scanpy.pp.highly_variable_genes(data, flavor="seurat", n_top_genes=50)
    found = choose_hvgs(values.mean(0), values.var(0, ddof=1), num=50)
    assert found.tolist() == np.flatnonzero(data.var["highly_variable"]).tolist()


def test_dispersion_against_a_slow_twin() -> None:
    values = _normalised(3)
    mean, variance = values.mean(0), values.var(0, ddof=1)
    expected = np.full(len(mean), -np.inf)
    log_mean = np.log1p(mean)
    edges = np.linspace(log_mean.min(), log_mean.max(), 21)
    bins = [max(int(np.searchsorted(edges, value, side="left")) - 1, 0) for value in log_mean]
    for gene in range(len(mean)):
        if variance[gene] == 0:
            continue
        peers = [np.log(variance[o] / mean[o]) for o in range(len(mean)) if bins[o] == bins[gene] and variance[o] > 0]
        own = np.log(variance[gene] / mean[gene])
        expected[gene] = 1.0 if len(peers) == 1 else (own - np.mean(peers)) / np.std(peers, ddof=1)
    np.testing.assert_allclose(normalised_dispersion(mean, variance), expected, rtol=1e-9)


def test_more_than_there_are_is_all_of_them() -> None:
    values = _normalised(genes=8)
    assert choose_hvgs(values.mean(0), values.var(0, ddof=1), num=2000).tolist() == list(range(8))
