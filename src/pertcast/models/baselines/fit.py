"""Fit a baseline on the effects of the training split, with every choice made by leave-one-out.

Invariants: only the examples are used. The left-out effect of an example is what the baseline predicts for it when
fitted on the others, with the same choices. Shapes: N examples, C contexts, F width of a feature, G genes.
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

PENALTIES: tuple[float, ...] = tuple(float(f"{10 ** (power / 2):.6g}") for power in range(8, -7, -1))
"""From 10,000, which leaves the mean effect, to 0.001."""
BANDWIDTHS = (0.5, 1.0, 2.0)
"""Of the Gaussian kernel, in units of the median distance of two examples."""
NEIGHBOURS = (40, 20, 12, 8, 5, 3, 2, 1)
SHARINGS = (1.0, 0.5, 0.0)
_TINY = 1e-9


class Fit(NamedTuple):
    """A baseline, and its prediction for each example when that one is left out."""

    baseline: Baseline  # Fitted on all examples
    left_out_NG: NDArray[np.float32]  # float32


class _Smoother(NamedTuple):
    """Kernel ridge with free context means: ``dual = whole @ effects``, for one kernel and penalty."""

    whole_NN: Array
    has_peers_N: NDArray[np.bool_]

    def left_out_errors(self, dual_NG: Array) -> Array:
        """Return effect minus left-out prediction in closed form; 0 for an example alone in its context."""
        own_N = np.diag(self.whole_NN).copy()
        own_N[~self.has_peers_N] = np.inf
        return dual_NG / own_N[:, None]


def fit_baseline(kind: BaselineKind, examples: Examples, *, set_size: int = 1) -> Fit:
    """Fit a baseline.

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
    panels = _panels(effect_NG)
    parts = [
        Examples(examples.context_N[rows], feature_NF[rows], effect_NG[np.ix_(rows, genes)], examples.num_contexts)
        for rows, genes in panels
    ]
    choice = _choose(kind, parts, Examples(examples.context_N, feature_NF, effect_NG, examples.num_contexts))
    mean_CG = np.zeros((examples.num_contexts + 1, effect_NG.shape[1]))
    weight_NG, left_out_NG = np.zeros_like(effect_NG), np.full_like(effect_NG, np.nan)
    for (rows, genes), part in zip(panels, parts, strict=True):
        solved = _solve_kind(kind, part, choice)
        mean_CG[:, genes] = solved.mean_CG
        weight_NG[np.ix_(rows, genes)] = solved.weight_NG
        left_out_NG[np.ix_(rows, genes)] = solved.left_out_NG
    choice = choice._replace(error=float(np.nanmean((effect_NG - left_out_NG) ** 2)))
    kept = slice(0 if kind in ("control", "mean") else count)
    spec = BaselineSpec(
        kind, effect_NG.shape[1], feature_NF.shape[1], examples.num_contexts, len(weight_NG[kept]), set_size, choice
    )
    baseline = Baseline(
        spec,
        mean_CG.astype(np.float32),
        examples.context_N[kept].astype(np.int64),
        feature_NF[kept].astype(np.float32),
        weight_NG[kept].astype(np.float32),
    )
    for row in np.flatnonzero(np.isnan(left_out_NG).any(axis=1)).tolist():
        # nothing was fitted on genes that an example did not measure, so nothing is left out
        fitted_G = predict_effects(baseline, feature_NF[row : row + 1], context=int(examples.context_N[row]))[0]
        left_out_NG[row] = np.where(np.isnan(left_out_NG[row]), fitted_G, left_out_NG[row])
    return Fit(baseline, left_out_NG.astype(np.float32))


def _panels(effect_NG: Array) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the rows and genes of each set of genes that the same examples measured."""
    measured_GN = ~np.isnan(effect_NG).T
    if measured_GN.all():
        return [(np.arange(len(effect_NG)), np.arange(effect_NG.shape[1]))]
    patterns, pattern_G = np.unique(measured_GN, axis=0, return_inverse=True)
    return [
        (np.flatnonzero(rows), np.flatnonzero(pattern_G.ravel() == number))
        for number, rows in enumerate(patterns)
        if rows.any()
    ]


class _Solved(NamedTuple):
    """Context means (C + 1, G), weights of the examples, and left-out predictions."""

    mean_CG: Array
    weight_NG: Array
    left_out_NG: Array


def _choose(kind: BaselineKind, parts: list[Examples], whole: Examples) -> Choice:
    """Return the choice with the smallest left-out squared error over all parts; the first of equal ones."""
    if kind in ("control", "mean"):
        return Choice()
    sharings = (1.0,) if len(np.unique(whole.context_N)) == 1 else (1.0, 0.0) if kind == "knn" else SHARINGS
    errors: dict[Choice, float] = {}
    for part in parts:
        if kind == "knn":
            found = _neighbour_errors(part, sharings, most=len(whole.context_N))
        else:
            found = _kernel_errors(kind, part, sharings, _kernels(kind, whole.feature_NF))
        for choice, error in found:
            errors[choice] = errors.get(choice, 0.0) + error
    best, best_error = Choice(), np.inf
    for choice, error in errors.items():
        # eigenvectors differ in the last bits from machine to machine; equal errors must not be told apart
        if error < best_error * (1 - _TINY):
            best, best_error = choice, error
    return best


def _solve_kind(kind: BaselineKind, examples: Examples, choice: Choice) -> _Solved:
    nothing_NG = np.zeros_like(examples.effect_NG)
    if kind == "control":
        return _Solved(np.zeros((examples.num_contexts + 1, nothing_NG.shape[1])), nothing_NG, nothing_NG)
    if kind == "mean":
        return _Solved(_context_means(examples), nothing_NG, _left_out_means(examples))
    if kind == "knn":
        mean_CG = _context_means(examples)
        return _Solved(
            mean_CG, examples.effect_NG - mean_CG[examples.context_N], _left_out_neighbours(examples, choice)
        )
    mean_CG, dual_NG, smoother = _solve(kind, examples, choice)
    left_out_NG = examples.effect_NG - smoother.left_out_errors(dual_NG)
    for row in np.flatnonzero(~smoother.has_peers_N).tolist():
        left_out_NG[row] = _refit_without(kind, examples, choice, row)
    return _Solved(mean_CG, dual_NG, left_out_NG)


def _with_fallback(mean_CG: Array, context_N: NDArray[np.int64]) -> Array:
    """Fill contexts without examples, and the last row, with the mean over the others, (C + 1, G)."""
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
    """Return the mean effect of each example's context without it; alone, the mean of other contexts."""
    context_N, effect_NG = examples.context_N, examples.effect_NG
    mean_CG, sizes = _context_means(examples), np.bincount(context_N, minlength=examples.num_contexts)
    size_N = sizes[context_N][:, None]
    left_out = (mean_CG[context_N] * size_N - effect_NG) / np.maximum(size_N - 1, 1)
    for row in np.flatnonzero(sizes[context_N] == 1):
        rest = [code for code in np.unique(context_N) if code != context_N[row]]
        left_out[row] = mean_CG[rest].mean(axis=0) if rest else 0.0
    return left_out


def _kernels(kind: BaselineKind, feature_NF: NDArray[np.floating]) -> Iterator[Choice]:
    if kind == "ridge":
        square = float((feature_NF**2).sum(axis=1).mean())
        yield Choice(scale=square if square > 0 else 1.0)
        return
    apart = distances(feature_NF, feature_NF)
    apart = apart[apart > 0]
    typical = float(np.median(apart)) if len(apart) else 1.0
    for share in reversed(BANDWIDTHS):
        yield Choice(bandwidth=share * typical)


def _kernel_errors(
    kind: BaselineKind, examples: Examples, sharings: tuple[float, ...], shapes: Iterator[Choice]
) -> Iterator[tuple[Choice, float]]:
    """Yield every choice, the strongest penalty first, with its left-out squared error."""
    context_N, effect_NG = examples.context_N, examples.effect_NG
    product_NN = effect_NG @ effect_NG.T
    same_NN = context_N[:, None] == context_N
    has_peers_N = same_NN.sum(axis=1) > 1
    free_NN = np.eye(len(context_N)) - same_NN / same_NN.sum(axis=1)
    for shape in shapes:
        alike_NN = kernel(kind, examples.feature_NF, examples.feature_NF, shape)
        for sharing in sharings:
            kernel_NN = alike_NN * np.where(same_NN, 1.0, sharing)
            values, vectors = np.linalg.eigh(free_NN @ kernel_NN @ free_NN)
            vectors = free_NN @ vectors
            seen = vectors.T @ product_NN @ vectors
            for penalty in PENALTIES:
                scaled = vectors / (np.maximum(values, 0) + penalty)
                own_N = (scaled * vectors).sum(axis=1)
                squares_N = ((scaled @ seen) * scaled).sum(axis=1)
                error = float((squares_N[has_peers_N] / own_N[has_peers_N] ** 2).sum())
                yield shape._replace(penalty=penalty, sharing=sharing), error


def _solve(kind: BaselineKind, examples: Examples, choice: Choice) -> tuple[Array, Array, _Smoother]:
    """Return the free means, the dual weights, which sum to 0 in each context, and their linear map."""
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
    rest = np.arange(len(examples.effect_NG)) != row
    context_N, feature_NF = examples.context_N, examples.feature_NF
    others = Examples(context_N[rest], feature_NF[rest], examples.effect_NG[rest], examples.num_contexts)
    if not len(others.effect_NG):
        return np.zeros(others.effect_NG.shape[1])
    mean_CG, dual_NG, _ = _solve(kind, others, choice)
    similar_N = np.where(others.context_N == context_N[row], 1.0, choice.sharing)
    near_N = kernel(kind, feature_NF[row : row + 1], others.feature_NF, choice)[0] * similar_N
    return mean_CG[context_N[row]] + near_N @ dual_NG


def _neighbour_errors(examples: Examples, sharings: tuple[float, ...], *, most: int) -> Iterator[tuple[Choice, float]]:
    for sharing in sharings:
        for count in [count for count in NEIGHBOURS if count < most] or [1]:
            choice = Choice(neighbours=count, sharing=sharing)
            yield choice, float(((examples.effect_NG - _left_out_neighbours(examples, choice)) ** 2).sum())


def _left_out_neighbours(examples: Examples, choice: Choice) -> Array:
    context_N, effect_NG = examples.context_N, examples.effect_NG
    distance_NN = distances(examples.feature_NF, examples.feature_NF)
    own_mean_NG = _left_out_means(examples)
    mean_CG, left_out_NG = _context_means(examples), np.empty_like(effect_NG)
    for row, context in enumerate(context_N):
        same_N = context_N == context
        is_other_N = np.arange(len(same_N)) != row
        allowed_N = (same_N if choice.sharing == 0 else np.ones(len(context_N), dtype=bool)) & is_other_N
        weight_N = neighbour_weights(distance_NN[row : row + 1], allowed_N, count=choice.neighbours)[0]
        mean_NG = np.where(same_N[:, None], own_mean_NG[row], mean_CG[context_N])
        left_out_NG[row] = own_mean_NG[row] + weight_N @ (effect_NG - mean_NG)
    return left_out_NG


def examples_of(baseline: Baseline) -> Examples:
    """Return examples that give the same baseline, up to rounding.

    >>> from pertcast.models.baselines.fit import fit_baseline
    >>> given = Examples(np.zeros(2, np.int64), np.eye(2), np.array([[1.0], [3.0]]), 1)
    >>> examples_of(fit_baseline("mean", given).baseline).effect_NG.tolist()
    [[2.0]]
    """
    spec, mean_CG = baseline.spec, baseline.mean_CG.astype(np.float64)
    if spec.kind in ("control", "mean"):
        # a context without examples has the last row's mean; where all have, they are one context's, and any will do
        own_C = np.flatnonzero((mean_CG[:-1] != mean_CG[-1]).any(axis=1))
        context_N = own_C if len(own_C) else np.zeros(1, dtype=np.int64)
        return Examples(context_N, np.zeros((len(context_N), spec.pert_dim)), mean_CG[context_N], spec.num_contexts)
    context_N, feature_NF = baseline.context_N, baseline.feature_NF.astype(np.float64)
    weight_NG = baseline.weight_NG.astype(np.float64)
    effect_NG = weight_NG + mean_CG[context_N]
    if spec.kind != "knn":
        same_NN = context_N[:, None] == context_N
        kernel_NN = kernel(spec.kind, feature_NF, feature_NF, spec.choice) * np.where(same_NN, 1.0, spec.choice.sharing)
        effect_NG = kernel_NN @ weight_NG + spec.choice.penalty * weight_NG + mean_CG[context_N]
    return Examples(context_N, feature_NF, effect_NG, spec.num_contexts)
