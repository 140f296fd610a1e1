"""Baselines against slow twins that refit for every left-out example, and normal equations."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pertcast.models.baselines import (
    Baseline,
    BaselineKind,
    Choice,
    Examples,
    examples_of,
    fit_baseline,
    open_baseline,
    predict_effects,
    save_baseline,
)
from pertcast.models.baselines.fit import BANDWIDTHS, NEIGHBOURS, PENALTIES, SHARINGS

KINDS: tuple[BaselineKind, ...] = ("control", "mean", "ridge", "kernel_ridge", "knn")
LEARNT: tuple[BaselineKind, ...] = ("ridge", "kernel_ridge", "knn")


def some_examples(sizes: tuple[int, ...] = (7, 5, 1), *, seed: int = 0, num_contexts: int = 4) -> Examples:
    """Return examples whose effects follow their features; the last context has none."""
    random = np.random.default_rng(seed)
    contexts = np.repeat(np.arange(len(sizes)), sizes)
    features = random.normal(size=(len(contexts), 3))
    # the same perturbations in the first two contexts
    features[sizes[0] : sizes[0] + min(sizes[1:2] or (0,))] = features[: min(sizes[1:2] or (0,))]
    effects = features @ random.normal(size=(3, 6)) + contexts[:, None] + 0.5 * random.normal(size=(len(contexts), 6))
    return Examples(contexts, features, effects, num_contexts)


def without(examples: Examples, row: int) -> Examples:
    kept = np.arange(len(examples.context_N)) != row
    return Examples(
        examples.context_N[kept], examples.feature_NF[kept], examples.effect_NG[kept], examples.num_contexts
    )


def slow_predict(kind: BaselineKind, known: Examples, choice: Choice, feature: np.ndarray, context: int) -> np.ndarray:
    """Fit with fixed choices by one large system of equations (or loops), and predict one effect."""
    present = sorted(set(known.context_N.tolist()))
    zero = np.zeros(known.effect_NG.shape[1])
    if not present or kind == "control":
        return zero
    if kind in ("mean", "knn"):
        means = {code: known.effect_NG[known.context_N == code].mean(axis=0) for code in present}
    if kind == "mean":
        return np.asarray(means.get(context, np.mean([means[code] for code in present], axis=0)))

    def similarity(one: np.ndarray, other: np.ndarray) -> float:
        if kind == "ridge":
            return float(one @ other / choice.scale)
        return float(np.exp(-((one - other) ** 2).sum() / (2 * choice.bandwidth**2)))

    if kind == "knn":
        offered = [n for n, code in enumerate(known.context_N) if choice.sharing or code == context]
        distance = {n: float(np.sqrt(((known.feature_NF[n] - feature) ** 2).sum())) for n in offered}
        nearest = sorted(offered, key=lambda n: distance[n])[: choice.neighbours]
        typical = np.mean(list(distance.values())) if offered else 0
        weights = {n: 1 / (distance[n] + 1e-3 * typical) if typical else 1 for n in nearest}
        total = sum(weights.values())
        start = means.get(context, np.mean([means[code] for code in present], axis=0))
        deviations = {n: known.effect_NG[n] - means[int(known.context_N[n])] for n in nearest}
        for n in nearest:
            start = start + weights[n] / total * deviations[n]
        return np.asarray(start)
    count = len(known.context_N)
    system = np.zeros((count + len(present), count + len(present)))
    for one, other in product(range(count), range(count)):
        shared = 1.0 if known.context_N[one] == known.context_N[other] else choice.sharing
        system[one, other] = similarity(known.feature_NF[one], known.feature_NF[other]) * shared
        system[one, one] += choice.penalty if one == other else 0
    for one in range(count):
        column = count + present.index(known.context_N[one])
        system[one, column] = system[column, one] = 1
    solved = np.linalg.solve(system, np.vstack([known.effect_NG, np.zeros((len(present), len(zero)))]))
    own = {code: solved[count + place] for place, code in enumerate(present)}
    effect = own.get(context, np.mean(list(own.values()), axis=0))
    for n in range(count):
        shared = 1.0 if known.context_N[n] == context else choice.sharing
        effect = effect + shared * similarity(feature, known.feature_NF[n]) * solved[n]
    return np.asarray(effect)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(8,), (6, 4), (7, 5, 1), (1,), (1, 1)])
def test_left_out_effects_are_those_of_a_fit_on_the_others(kind: BaselineKind, sizes: tuple[int, ...]) -> None:
    examples = some_examples(sizes)
    fit = fit_baseline(kind, examples)
    choice = fit.baseline.spec.choice
    for row, context in enumerate(examples.context_N.tolist()):
        expected = slow_predict(kind, without(examples, row), choice, examples.feature_NF[row], context)
        np.testing.assert_allclose(fit.left_out_NG[row], expected, rtol=1e-5, atol=1e-5)
    error = ((fit.left_out_NG - examples.effect_NG) ** 2).mean()
    assert choice.error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_in_contexts_with_and_without_examples(kind: BaselineKind) -> None:
    examples = some_examples()
    baseline = fit_baseline(kind, examples).baseline
    asked = np.random.default_rng(5).normal(size=(3, 3))
    for context in (0, 1, 2, 3, -1):
        found = predict_effects(baseline, asked, context=context)
        assert found.dtype == np.float32
        for row, feature in zip(found, asked, strict=True):
            expected = slow_predict(kind, examples, baseline.spec.choice, feature, context)
            np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)


def test_ridge_in_one_context_is_the_normal_equations_with_a_free_intercept() -> None:
    examples = some_examples((9,))
    baseline = fit_baseline("ridge", examples).baseline
    choice = baseline.spec.choice
    inputs = np.hstack([examples.feature_NF / np.sqrt(choice.scale), np.ones((9, 1))])
    penalty = np.diag([choice.penalty] * 3 + [0])
    coefficients = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ examples.effect_NG)
    np.testing.assert_allclose(
        predict_effects(baseline, examples.feature_NF, context=0), inputs @ coefficients, rtol=1e-4, atol=1e-5
    )


def candidates(kind: BaselineKind, examples: Examples) -> list[Choice]:
    features = np.asarray(examples.feature_NF)
    scale = float((features**2).sum(axis=1).mean())
    apart = np.sqrt(((features[:, None] - features) ** 2).sum(axis=-1))
    median = float(np.median(apart[apart > 0]))
    if kind == "ridge":
        return [Choice(penalty=p, scale=scale, sharing=s) for p in PENALTIES for s in SHARINGS]
    if kind == "knn":
        return [Choice(neighbours=n, sharing=s) for n in NEIGHBOURS if n < len(features) for s in (1.0, 0.0)]
    return [
        Choice(penalty=p, bandwidth=b * median, sharing=s) for p in PENALTIES[::4] for b in BANDWIDTHS for s in SHARINGS
    ]


@pytest.mark.parametrize("kind", LEARNT)
def test_no_other_choice_has_a_smaller_left_out_error(kind: BaselineKind) -> None:
    examples = some_examples((6, 4))
    chosen = fit_baseline(kind, examples).baseline.spec.choice
    for choice in candidates(kind, examples):
        left_out = [
            slow_predict(kind, without(examples, row), choice, examples.feature_NF[row], context)
            for row, context in enumerate(examples.context_N.tolist())
        ]
        assert ((left_out - examples.effect_NG) ** 2).mean() >= chosen.error * (1 - 1e-6)


@pytest.mark.parametrize("kind", ["ridge", "kernel_ridge"])
def test_features_that_say_nothing_leave_the_mean_effect(kind: BaselineKind) -> None:
    random = np.random.default_rng(1)
    effects = random.normal(size=(12, 5))
    examples = Examples(np.zeros(12, np.int64), np.ones((12, 2)), effects, 1)
    found = predict_effects(fit_baseline(kind, examples).baseline, random.normal(size=(2, 2)), context=0)
    np.testing.assert_allclose(found, np.tile(effects.mean(axis=0), (2, 1)), atol=1e-3)


def test_contexts_that_agree_share_and_contexts_that_do_not_are_kept_apart() -> None:
    random = np.random.default_rng(3)
    features = np.tile(np.eye(8), (2, 1))
    effects = random.normal(size=(8, 30))
    contexts = np.repeat([0, 1], 8)
    agree = fit_baseline("ridge", Examples(contexts, features, np.tile(effects, (2, 1)), 2))
    assert agree.baseline.spec.choice.sharing == 1
    opposed = fit_baseline("ridge", Examples(contexts, features, np.vstack([effects, -effects]), 2))
    assert opposed.baseline.spec.choice.sharing == 0
    assert agree.baseline.spec.choice.error < 0.05 < opposed.baseline.spec.choice.error


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_is_read_back_as_it_was_written(kind: BaselineKind, tmp_path: Path) -> None:
    baseline = fit_baseline(kind, some_examples(), set_size=12).baseline
    save_baseline(baseline, tmp_path / "base")
    same(open_baseline(tmp_path / "base"), baseline)


def same(one: Baseline, other: Baseline) -> None:
    assert one.spec == other.spec
    for name, shape in other.spec.shapes().items():
        found, expected = getattr(one, name), getattr(other, name)
        assert found.dtype == expected.dtype
        assert found.shape == shape
        np.testing.assert_array_equal(found, expected)


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="expected examples"):
        fit_baseline("mean", Examples(np.zeros(0, np.int64), np.zeros((0, 2)), np.zeros((0, 3)), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_fitted_on_the_examples_that_are_found_in_it_is_the_same(kind: BaselineKind) -> None:
    given = some_examples()
    baseline = fit_baseline(kind, given, set_size=4).baseline
    found = examples_of(baseline)
    again = fit_baseline(kind, found, set_size=4).baseline
    asked = np.random.default_rng(3).normal(size=(5, 3))
    for context in (0, 1, 2, 3, -1):
        np.testing.assert_allclose(
            predict_effects(again, asked, context=context), predict_effects(baseline, asked, context=context), atol=1e-4
        )
    if kind in LEARNT:
        np.testing.assert_allclose(found.effect_NG, given.effect_NG, atol=1e-4)
        np.testing.assert_array_equal(found.context_N, given.context_N)


def test_the_mean_of_one_context_alone_is_found_again() -> None:
    given = Examples(np.full(3, 1), np.eye(3), np.arange(6.0).reshape(3, 2), 2)
    found = examples_of(fit_baseline("mean", given).baseline)
    np.testing.assert_allclose(found.effect_NG, [[2.0, 3.0]])
