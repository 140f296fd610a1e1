"""The metrics of season 2025 against slow twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pertcast.stats.metrics import (
    de_overlap,
    discrimination,
    effect_correlation,
    is_significant,
    mean_absolute_error,
    overall,
    relative,
    spearman_brown,
)


def overlap_by_sets(real: NDArray[np.bool_], predicted: NDArray[np.bool_], fold_change: NDArray[np.floating]) -> float:
    """Take the largest predicted fold changes one by one."""
    wanted = {gene for gene, is_de in enumerate(real) if is_de}
    called = sorted((gene for gene, is_de in enumerate(predicted) if is_de), key=lambda gene: -abs(fold_change[gene]))
    return len(wanted & set(called[: len(wanted)])) / len(wanted) if wanted else 0.0


@given(seed=st.integers(0, 2**32), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_des_takes_as_many_predicted_genes_as_there_are_real_ones(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    real, predicted = rng.random((3, 20)) < 0.3, rng.random((3, 20)) < density
    fold_change = rng.normal(size=(3, 20)).astype(np.float32)
    fold_change[:, 3] = -np.inf
    found = de_overlap(real, predicted, fold_change)
    expected = [overlap_by_sets(*rows) for rows in zip(real, predicted, fold_change, strict=True)]
    np.testing.assert_allclose(found.score, expected)
    assert found.num_real.tolist() == real.sum(axis=1).tolist()
    assert found.num_predicted.tolist() == predicted.sum(axis=1).tolist()
    assert (found.num_tied == 0).all()


def test_equal_fold_changes_at_the_cut_are_counted() -> None:
    everything, two = np.ones((1, 4), dtype=bool), np.array([[True, True, False, False]])
    assert de_overlap(two, everything, np.array([[1.0, -1.0, 1.0, 0.5]])).num_tied.tolist() == [3]
    assert de_overlap(two, everything, np.array([[1.0, -1.0, 0.9, 0.9]])).num_tied.tolist() == [0]


@given(seed=st.integers(0, 2**32), num_perts=st.integers(1, 8))
def test_pds_counts_the_nearer_perturbations_without_the_own_gene(seed: int, num_perts: int) -> None:
    rng = np.random.default_rng(seed)
    real, predicted = rng.normal(size=(2, num_perts, 12))
    own_gene = rng.integers(-1, 12, size=num_perts)
    expected = []
    for pert in range(num_perts):
        kept = [gene for gene in range(12) if gene != own_gene[pert]]
        distances = [sum(abs(real[other, gene] - predicted[pert, gene]) for gene in kept) for other in range(num_perts)]
        expected.append(1 - sum(distance < distances[pert] for distance in distances) / num_perts)
    np.testing.assert_allclose(discrimination(real, predicted, own_gene), expected)


def test_the_own_gene_gives_nothing_away() -> None:
    real, predicted = np.array([[9.0, 1.0], [0.0, 2.0]]), np.array([[9.0, 2.0], [0.0, 1.0]])
    assert discrimination(real, predicted, np.array([-1, -1])).tolist() == [1, 1]
    assert discrimination(real, predicted, np.array([0, 0])).tolist() == [0.5, 0.5]


def test_mae_and_correlation_are_what_they_say() -> None:
    rng = np.random.default_rng(3)
    real, predicted = rng.normal(size=(2, 4, 30)).astype(np.float32)
    np.testing.assert_allclose(
        mean_absolute_error(real, predicted), [np.mean(np.abs(p - r)) for p, r in zip(predicted, real, strict=True)],
        rtol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(
        effect_correlation(real, predicted), [np.corrcoef(p, r)[0, 1] for p, r in zip(predicted, real, strict=True)],
        rtol=1e-5,
    )  # fmt: skip
    assert np.isnan(effect_correlation(real, np.ones_like(real))).all()


def test_significance_is_judged_in_single_precision() -> None:
    assert is_significant(np.array([0.05, 0.05 - 1e-12, 0.0499999])).tolist() == [False, False, True]


def test_the_overall_clips_each_metric_and_relative_does_not() -> None:
    baseline = {"mae": 0.1, "pds": 0.5, "des": 0.2}
    worse = {"mae": 0.2, "pds": 0.75, "des": 0.1}
    assert relative(worse, baseline) == pytest.approx({"mae": -1, "pds": 0.5, "des": -0.125})
    assert overall(worse, baseline) == pytest.approx(0.5 / 3)
    perfect = {"mae": 0.0, "pds": 1.0, "des": 1.0}
    assert overall(perfect, baseline) == 1
    assert np.isnan(list(relative(perfect, perfect).values())).all()
    assert overall(perfect, perfect) == 0  # as `cell-eval score` has it


def test_the_full_depth_of_no_agreement_is_unknown() -> None:
    assert np.isnan(spearman_brown(0.0))
    assert spearman_brown(1.0) == 1
