"""Fits a baseline on the effects of the training split; every choice is made by leave-one-out within it.

Invariants: nothing but the examples is looked at; the left-out effect of an example is what the baseline predicts for
it when fitted on the others, with the choices kept.
Shapes: N examples, C contexts, F width of a feature, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.models.baselines.predict import (
    Array,
    Baseline,
    BaselineKind,
    BaselineSpec,
    Choice,
    Examples,
    distances,
    kernel,
    neighbour_weights,
    predict_effects,
)

__all__ = ["BANDWIDTHS", "NEIGHBOURS", "PENALTIES", "SHARINGS", "Fit", "fit_baseline"]

PENALTIES: tuple[float, ...] = tuple(float(f"{10 ** (power / 2):.6g}") for power in range(8, -7, -1))
"""From 10,000, which leaves the mean effect, to 0.001."""
BANDWIDTHS = (0.5, 1.0, 2.0)
"""Of the Gaussian kernel, in units of the median distance of two examples."""
NEIGHBOURS = (40, 20, 12, 8, 5, 3, 2, 1)
SHARINGS = (1.0, 0.5, 0.0)
_TINY = 1e-9


class Fit(NamedTuple):
    """A baseline, and what it predicts for each example when that one is left out.

    Attributes
    ----------
    baseline
        Fitted on all examples.
    left_out_NG
        float32.
    """

    baseline: Baseline
    left_out_NG: NDArray[np.float32]  # noqa: N815


class _Smoother(NamedTuple):
    """Kernel ridge with free context means: ``dual = whole @ effects``, for one kernel and penalty."""

    whole_NN: Array  # noqa: N815
    has_peers_N: NDArray[np.bool_]  # noqa: N815

    def left_out_errors(self, dual_NG: Array) -> Array:
        """Return effect minus left-out prediction, in closed form; 0 for examples alone in their context."""
        own_N = np.diag(self.whole_NN).copy()
        own_N[~self.has_peers_N] = np.inf
        return dual_NG / own_N[:, None]


def fit_baseline(kind: BaselineKind, examples: Examples, *, set_size: int = 1) -> Fit:
    """Fit a baseline.

    The mean effect of a context is the mean over its examples, each perturbation weighing the same; that of a context
    without examples is the mean over the other contexts' means. Ridge and kernel ridge leave the means of contexts
    free and penalise the rest; penalty, bandwidth and the sharing between contexts (see
    :mod:`pertcast.models.baselines.predict`) are those of the smallest squared error of left-out effects, which
    ``(K + penalty)^-1`` gives in closed form. With one context there is nothing to keep apart, so sharing is 1.
    The number of neighbours is chosen likewise. Of equal errors the stronger restraint wins.

    Parameters
    ----------
    kind
        Which baseline.
    examples
        Effects and features of the training split alone.
    set_size
        Kept in the specification.

    Raises
    ------
    ValueError
        If there are no examples, or shapes do not fit.

    References
    ----------
    Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.7 (free means) and 5.4.2
    (leave-one-out).

    Examples
    --------
    >>> examples = Examples(np.zeros(3, np.int64), np.eye(3), np.array([[1.0], [2.0], [6.0]]), 1)
    >>> fit = fit_baseline("mean", examples)
    >>> fit.left_out_NG.ravel().tolist()
    [4.0, 3.5, 1.5]
    """
    effect_NG = np.asarray(examples.effect_NG, dtype=np.float64)
    feature_NF = np.asarray(examples.feature_NF, dtype=np.float64)
    count = len(effect_NG)
    if not count or len(feature_NF) != count or len(examples.context_N) != count:
        raise ValueError(f"expected examples of one length above 0, got {count}, {len(feature_NF)}")
    work = Examples(examples.context_N, feature_NF, effect_NG, examples.num_contexts)
    if kind in ("control", "mean"):
        mean_CG = _context_means(work) if kind == "mean" else np.zeros((work.num_contexts + 1, effect_NG.shape[1]))
        baseline = _pack(kind, work, Choice(), mean_CG, np.zeros((0, effect_NG.shape[1])), set_size)
        left_out_NG = _left_out_means(work) if kind == "mean" else np.zeros_like(effect_NG)
        error = float(((effect_NG - left_out_NG) ** 2).mean())
        baseline = _pack(kind, work, Choice(error=error), mean_CG, baseline.weight_NG, set_size)
        return Fit(baseline, left_out_NG.astype(np.float32))
    if kind == "knn":
        return _fit_neighbours(work, set_size)
    return _fit_kernel(kind, work, set_size)


def _pack(
    kind: BaselineKind, examples: Examples, choice: Choice, mean_CG: Array, weight_NG: NDArray[np.floating], size: int
) -> Baseline:
    kept = slice(len(weight_NG))
    width = examples.feature_NF.shape[1]
    spec = BaselineSpec(kind, mean_CG.shape[1], width, examples.num_contexts, len(weight_NG), size, choice)
    return Baseline(
        spec,
        mean_CG.astype(np.float32),
        examples.context_N[kept].astype(np.int64),
        examples.feature_NF[kept].astype(np.float32),
        weight_NG.astype(np.float32),
    )


def _with_fallback(mean_CG: Array, context_N: NDArray[np.int64]) -> Array:
    """Return (C + 1, G): contexts without examples, and the last row, get the mean over the contexts with examples."""
    known = np.unique(context_N)
    whole = np.tile(mean_CG[known].mean(axis=0), (len(mean_CG) + 1, 1))
    whole[known] = mean_CG[known]
    return whole


def _context_means(examples: Examples) -> Array:
    sums = np.zeros((examples.num_contexts, examples.effect_NG.shape[1]))
    np.add.at(sums, examples.context_N, examples.effect_NG)
    sizes = np.bincount(examples.context_N, minlength=examples.num_contexts)
    return _with_fallback(sums / np.maximum(sizes, 1)[:, None], examples.context_N)


def _left_out_means(examples: Examples) -> Array:
    """Return the mean effect of each example's context without it; of an example alone, the mean of other contexts."""
    context_N, effect_NG = examples.context_N, examples.effect_NG
    mean_CG, sizes = _context_means(examples), np.bincount(context_N, minlength=examples.num_contexts)
    size_N = sizes[context_N][:, None]
    left_out = (mean_CG[context_N] * size_N - effect_NG) / np.maximum(size_N - 1, 1)
    for row in np.flatnonzero(sizes[context_N] == 1):
        rest = [code for code in np.unique(context_N) if code != context_N[row]]
        left_out[row] = mean_CG[rest].mean(axis=0) if rest else 0.0
    return left_out


def _without(examples: Examples, row: int) -> Examples:
    others = np.arange(len(examples.effect_NG)) != row
    return Examples(
        examples.context_N[others], examples.feature_NF[others], examples.effect_NG[others], examples.num_contexts
    )


def _sharings(context_N: NDArray[np.int64]) -> tuple[float, ...]:
    return SHARINGS if len(np.unique(context_N)) > 1 else (1.0,)


def _kernels(kind: BaselineKind, feature_NF: Array) -> Iterator[Choice]:
    if kind == "ridge":
        square = float((feature_NF**2).sum(axis=1).mean())
        yield Choice(scale=square if square > 0 else 1.0)
        return
    apart = distances(feature_NF, feature_NF)
    apart = apart[apart > 0]
    typical = float(np.median(apart)) if len(apart) else 1.0
    for share in reversed(BANDWIDTHS):
        yield Choice(bandwidth=share * typical)


def _fit_kernel(kind: BaselineKind, examples: Examples, set_size: int) -> Fit:
    context_N, effect_NG = examples.context_N, examples.effect_NG
    feature_NF = np.asarray(examples.feature_NF, dtype=np.float64)
    product_NN = effect_NG @ effect_NG.T
    same_NN = context_N[:, None] == context_N
    has_peers_N = same_NN.sum(axis=1) > 1
    free_NN = np.eye(len(context_N)) - same_NN / same_NN.sum(axis=1)
    best, best_score = None, np.inf
    for shape in _kernels(kind, feature_NF):
        alike_NN = kernel(kind, feature_NF, feature_NF, shape)
        for sharing in _sharings(context_N):
            kernel_NN = alike_NN * np.where(same_NN, 1.0, sharing)
            values, vectors = np.linalg.eigh(free_NN @ kernel_NN @ free_NN)
            vectors = free_NN @ vectors
            seen = vectors.T @ product_NN @ vectors
            for penalty in PENALTIES:
                scaled = vectors / (np.maximum(values, 0) + penalty)
                own_N = (scaled * vectors).sum(axis=1)
                squares_N = ((scaled @ seen) * scaled).sum(axis=1)
                score = float((squares_N[has_peers_N] / own_N[has_peers_N] ** 2).sum())
                # eigenvectors differ in the last bits from machine to machine; equal errors must not be told apart
                if best is None or score < best_score * (1 - _TINY):
                    best, best_score = shape._replace(penalty=penalty, sharing=sharing), score
    assert best is not None
    mean_CG, dual_NG, smoother = _solve(kind, examples, best)
    left_out_NG = effect_NG - smoother.left_out_errors(dual_NG)
    for row in np.flatnonzero(~has_peers_N).tolist():
        left_out_NG[row] = _refit_without(kind, examples, best, row)
    best = best._replace(error=float(((effect_NG - left_out_NG) ** 2).mean()))
    return Fit(_pack(kind, examples, best, mean_CG, dual_NG, set_size), left_out_NG.astype(np.float32))


def _solve(kind: BaselineKind, examples: Examples, choice: Choice) -> tuple[Array, Array, _Smoother]:
    """Return the free means, the dual weights, which sum to 0 in each context, and what made them of the effects."""
    context_N, effect_NG, count = examples.context_N, examples.effect_NG, len(examples.context_N)
    same_NN = context_N[:, None] == context_N
    feature_NF = np.asarray(examples.feature_NF, dtype=np.float64)
    alike_NN = kernel(kind, feature_NF, feature_NF, choice)
    kernel_NN = alike_NN * np.where(same_NN, 1.0, choice.sharing)
    codes, place_N = np.unique(context_N, return_inverse=True)
    member_NC = np.eye(len(codes))[place_N]
    bordered = np.block(
        [[kernel_NN + choice.penalty * np.eye(count), member_NC], [member_NC.T, np.zeros((len(codes), len(codes)))]]
    )
    inverse = np.linalg.inv(bordered)
    dual_NG, own_CG = inverse[:count, :count] @ effect_NG, inverse[count:, :count] @ effect_NG
    mean_CG = np.zeros((examples.num_contexts, effect_NG.shape[1]))
    mean_CG[codes] = own_CG
    has_peers_N = same_NN.sum(axis=1) > 1
    return _with_fallback(mean_CG, context_N), dual_NG, _Smoother(inverse[:count, :count], has_peers_N)


def _refit_without(kind: BaselineKind, examples: Examples, choice: Choice, row: int) -> Array:
    """Return the prediction for an example by a fit on all others."""
    rest = _without(examples, row)
    if not len(rest.effect_NG):
        return np.zeros(rest.effect_NG.shape[1])
    mean_CG, dual_NG, _ = _solve(kind, rest, choice)
    baseline = _pack(kind, rest, choice, mean_CG, dual_NG, 1)
    predicted: Array = predict_effects(
        baseline, examples.feature_NF[row : row + 1], context=int(examples.context_N[row])
    )[0].astype(np.float64)
    return predicted


def _fit_neighbours(examples: Examples, set_size: int) -> Fit:
    context_N, effect_NG = examples.context_N, examples.effect_NG
    feature_NF = np.asarray(examples.feature_NF, dtype=np.float64)
    distance_NN = distances(feature_NF, feature_NF)
    counts = [count for count in NEIGHBOURS if count < len(effect_NG)] or [1]
    best, best_error, best_left_out = Choice(neighbours=1, sharing=1.0), np.inf, _left_out_means(examples)
    for sharing in (1.0, 0.0) if len(np.unique(context_N)) > 1 else (1.0,):
        for count in counts:
            left_out_NG = _left_out_neighbours(examples, distance_NN, count=count, sharing=sharing)
            error = float(((effect_NG - left_out_NG) ** 2).mean())
            if error < best_error * (1 - _TINY):
                best, best_error, best_left_out = Choice(neighbours=count, sharing=sharing), error, left_out_NG
    mean_CG = _context_means(examples)
    baseline = _pack(
        "knn", examples, best._replace(error=best_error), mean_CG, effect_NG - mean_CG[context_N], set_size
    )
    return Fit(baseline, best_left_out.astype(np.float32))


def _left_out_neighbours(examples: Examples, distance_NN: Array, *, count: int, sharing: float) -> Array:
    context_N, effect_NG = examples.context_N, examples.effect_NG
    own_mean_NG = _left_out_means(examples)
    mean_CG, left_out_NG = _context_means(examples), np.empty_like(effect_NG)
    for row, context in enumerate(context_N):
        same_N = context_N == context
        allowed_N = (same_N if sharing == 0 else np.ones(len(context_N), dtype=bool)) & (np.arange(len(same_N)) != row)
        weight_N = neighbour_weights(distance_NN[row : row + 1], allowed_N, count=count)[0]
        mean_NG = np.where(same_N[:, None], own_mean_NG[row], mean_CG[context_N])
        left_out_NG[row] = own_mean_NG[row] + weight_N @ (effect_NG - mean_NG)
    return left_out_NG
