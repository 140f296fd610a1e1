"""The metrics of season 2025 (MAE, PDS, DES, overall), equal to cell-eval's profile ``vcc``, and effects of groups.

Legend of shapes: P perturbations, G genes. Means are of log1p values, and an effect is a mean minus the control's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial.distance import cdist

from pertcast.stats.de import FDR, differential_expression
from pertcast.stats.groups import group_cells, group_means

BEST: Mapping[str, float] = {"mae": 0.0, "pds": 1.0, "des": 1.0}
"""The metrics that the overall averages, and their best value."""


class Overlap(NamedTuple):
    """How well predicted DE genes match the real ones."""

    score: NDArray[np.float64]  # (P,) DES: shared genes over real ones, 0 if there is no real one
    # (P,) DE genes of each side; shared ones among as many predicted ones as there are real ones
    num_real: NDArray[np.int64]
    num_predicted: NDArray[np.int64]
    num_shared: NDArray[np.int64]
    # (P,) predicted genes whose fold change is that of the last one taken, where not all of them are taken:
    # which of them counts is arbitrary (file order here; cell-eval's order is that of an unstable sort)
    num_tied: NDArray[np.int64]


def is_significant(fdr: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return whether an adjusted p-value, rounded to single precision as in cell-eval, is below 0.05."""
    return fdr.astype(np.float32) < np.float32(FDR)


def de_overlap(
    real: NDArray[np.bool_], predicted: NDArray[np.bool_], predicted_log2_fold_change: NDArray[np.floating]
) -> Overlap:
    """Return the differential expression score (cell-eval: ``overlap_at_N``).

    >>> real, predicted = np.array([[True, True, False]]), np.array([[True, True, True]])
    >>> de_overlap(real, predicted, np.array([[0.5, -2.0, 1.0]])).score.tolist()
    [0.5]
    """
    size = np.abs(predicted_log2_fold_change).astype(np.float32)
    shared, tied = np.zeros(len(real), dtype=np.int64), np.zeros(len(real), dtype=np.int64)
    num_real, num_predicted = real.sum(axis=1), predicted.sum(axis=1)
    for pert, number in enumerate(num_real):
        called = np.flatnonzero(predicted[pert])
        ranked = called[np.argsort(-size[pert, called], kind="stable")]
        shared[pert] = np.count_nonzero(real[pert, ranked[:number]])
        if 0 < number < len(ranked) and size[pert, ranked[number - 1]] == size[pert, ranked[number]]:
            tied[pert] = np.count_nonzero(size[pert, ranked] == size[pert, ranked[number]])
    score = np.divide(shared, num_real, out=np.zeros(len(real)), where=num_real > 0)
    return Overlap(score, num_real, num_predicted, shared, tied)


def discrimination(
    real_effects: NDArray[np.floating],
    predicted_effects: NDArray[np.floating],
    own_gene: NDArray[np.int64],
    *,
    own_row: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Return the perturbation discrimination score (cell-eval: ``discrimination_score_l1``), (P,).

    >>> real = np.array([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    >>> discrimination(real, real[::-1], np.array([2, -1])).tolist()
    [0.5, 0.5]
    """
    rows = np.arange(len(real_effects)) if own_row is None else own_row
    scores = np.empty(len(rows))
    for pert, row in enumerate(rows):
        kept = np.arange(real_effects.shape[1]) != own_gene[pert]
        distances = cdist(real_effects[:, kept], predicted_effects[pert : pert + 1, kept], "cityblock")[:, 0]
        # the sort that cell-eval takes, so that equal distances fall as they do there
        rank = np.flatnonzero(np.argsort(distances) == row)[0]
        scores[pert] = 1 - rank / len(real_effects)
    return scores


def mean_absolute_error(real_means: NDArray[np.floating], predicted_means: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean over genes of |predicted - real| of each perturbation, (P,).

    >>> mean_absolute_error(np.array([[1.0, 2.0]]), np.array([[1.5, 1.0]])).tolist()
    [0.75]
    """
    return np.abs(predicted_means.astype(np.float64) - real_means).mean(axis=1)


def effect_correlation(
    real_effects: NDArray[np.floating], predicted_effects: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return Pearson's correlation of effects over genes (cell-eval: ``pearson_delta``), (P,); NaN if constant.

    >>> effect_correlation(np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 4.0, 6.0]])).round(9).tolist()
    [1.0]
    """
    real, predicted = (
        effects - effects.mean(axis=1, keepdims=True)
        for effects in (real_effects.astype(np.float64), predicted_effects.astype(np.float64))
    )
    scale = np.linalg.norm(real, axis=1) * np.linalg.norm(predicted, axis=1)
    flat = (np.ptp(real_effects, axis=1) == 0) | (np.ptp(predicted_effects, axis=1) == 0)
    correlation = np.full(len(real), np.nan)
    np.divide((real * predicted).sum(axis=1), scale, out=correlation, where=~flat & (scale > 0))
    return correlation


def relative(values: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Return how far each metric of :data:`BEST` is from the baseline (0) to the best (1); below 0 if worse."""
    gained = {}
    for name, best in BEST.items():
        distance = best - baseline[name]
        gained[name] = (values[name] - baseline[name]) / distance if distance else float("nan")
    return gained


def overall(values: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """Return the mean of the relative metrics, each clipped at 0 (`cell-eval score`: ``avg_score``).

    >>> overall({"mae": 0.5, "pds": 0.75, "des": 0.1}, {"mae": 1.0, "pds": 0.5, "des": 0.2})
    0.3333333333333333
    """
    gained = relative(values, baseline).values()
    return sum(max(value, 0.0) if value == value else 0.0 for value in gained) / len(BEST)


def spearman_brown(score: float) -> float:
    """Return the full-depth score from the score of one half against the other; NaN at 0 and below.

    >>> spearman_brown(0.5)
    0.6666666666666666
    """
    return 2 * score / (1 + score) if score > 0 else float("nan")


class EffectAgreement(NamedTuple):
    """How a predicted effect agrees with a measured one."""

    predicted_size: float  # L2 norms over genes
    measured_size: float
    correlation: float  # Pearson correlation over genes; NaN if one of the two is constant


def compare_effects(predicted_G: NDArray[np.floating], measured_G: NDArray[np.floating]) -> EffectAgreement:
    """Compare two effects over the same genes.

    >>> compare_effects(np.array([3.0, 4.0]), np.array([3.0, 4.0]))
    EffectAgreement(predicted_size=5.0, measured_size=5.0, correlation=1.0)
    """
    predicted, measured = predicted_G.astype(np.float64), measured_G.astype(np.float64)
    sizes = float(np.linalg.norm(predicted)), float(np.linalg.norm(measured))
    predicted, measured = predicted - predicted.mean(), measured - measured.mean()
    scale = np.linalg.norm(predicted) * np.linalg.norm(measured)
    return EffectAgreement(*sizes, round(float(predicted @ measured / scale), 12) if scale > 0 else float("nan"))


def knockdown(perturbed_log1p: float, control_log1p: float) -> float:
    """Return the remaining share of a gene's expression, from mean log1p values.

    >>> round(knockdown(np.log1p(1.0), np.log1p(10.0)), 3)
    0.1
    """
    return float(np.expm1(perturbed_log1p) / np.expm1(control_log1p)) if control_log1p > 0 else float("nan")


class Profile(NamedTuple):
    """Perturbations compared with one set of control cells, (P, G) each."""

    means: NDArray[np.float64]  # Mean log1p, and that minus the control's
    effects: NDArray[np.float64]
    # Which genes are differentially expressed, by the official statistics, and by how much
    significant: NDArray[np.bool_]
    log2_fold_change: NDArray[np.float64]


def profile_of(
    cells_log1p: sparse.csr_matrix | NDArray[np.floating],
    codes: NDArray[np.int64],
    controls_log1p: sparse.csr_matrix,
    *,
    threads: int = 1,
) -> Profile:
    """Return the profile of cells."""
    ours = group_cells(cells_log1p, codes)
    theirs = group_cells(controls_log1p, np.zeros(controls_log1p.shape[0], dtype=np.int64))
    table = differential_expression(ours, theirs, threads=threads)
    means, control_mean = group_means(ours)[0], group_means(theirs)[0]
    return Profile(means, means - control_mean, is_significant(table.fdr), table.log2_fold_change)


def constant_profile(
    cell_log1p: NDArray[np.floating], sizes: NDArray[np.int64], controls_log1p: sparse.csr_matrix, *, threads: int = 1
) -> Profile:
    """Return the profile of perturbations whose cells are all the same; they have `sizes` (P,) cells."""
    distinct, place = np.unique(sizes, return_inverse=True)
    codes = np.repeat(np.arange(len(distinct)), distinct)
    copies = np.broadcast_to(cell_log1p.astype(controls_log1p.dtype), (len(codes), len(cell_log1p)))
    found = profile_of(copies, codes, controls_log1p, threads=threads)
    return Profile(found.means[place], found.effects[place], found.significant[place], found.log2_fold_change[place])


def score_profiles(predicted: Profile, real: Profile, own_gene: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of each perturbation, (P,): ``mae``, ``pds``, ``des``."""
    return {
        "mae": mean_absolute_error(real.means, predicted.means),
        "pds": discrimination(real.effects, predicted.effects, own_gene),
        "des": de_overlap(real.significant, predicted.significant, predicted.log2_fold_change).score,
    }
