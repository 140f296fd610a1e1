"""Paired bootstrap intervals: against a slow twin, and what pairing is for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pertcast.stats.intervals import Resamples, draw_resamples, interval, resampled_means


def by_hand(values_SU: NDArray[np.float64], resamples: Resamples) -> list[float]:
    found = []
    for seeds, units in zip(resamples.seeds_RS, resamples.units_RU, strict=True):
        drawn = [
            values_SU[min(seed, len(values_SU) - 1), unit]
            for seed, times in enumerate(seeds)
            for _ in range(int(times))
            for unit, again in enumerate(units)
            for _ in range(int(again))
        ]
        known = [value for value in drawn if not np.isnan(value)]
        found.append(sum(known) / len(known) if known else float("nan"))
    return found


@pytest.mark.parametrize("num_rows", [1, 3])
def test_means_are_those_of_the_values_drawn(num_rows: int) -> None:
    values = np.random.default_rng(0).normal(size=(num_rows, 5))
    values[0, 2] = np.nan
    resamples = draw_resamples(["a", "b", "b", "c", "d"], num_seeds=3, num=40)
    np.testing.assert_allclose(resampled_means(values, resamples), by_hand(values, resamples), rtol=1e-12)


def test_draws_are_as_many_as_there_are_and_keep_the_units_of_a_target_together() -> None:
    resamples = draw_resamples(["a", "b", "a", "c"], num_seeds=4, num=200)
    assert (resamples.seeds_RS.sum(axis=1) == 4).all()
    np.testing.assert_array_equal(resamples.units_RU[:, 0], resamples.units_RU[:, 2])
    assert (resamples.units_RU[:, [0, 1, 3]].sum(axis=1) == 3).all()
    np.testing.assert_array_equal(
        resamples.units_RU, draw_resamples(["a", "b", "a", "c"], num_seeds=4, num=200).units_RU
    )


def test_the_interval_of_a_mean_is_about_two_standard_errors_to_each_side() -> None:
    values = np.random.default_rng(1).normal(size=(1, 400))
    resamples = draw_resamples([str(unit) for unit in range(400)], num_seeds=1, num=4000)
    found = interval(float(values.mean()), resampled_means(values, resamples))
    error = values.std() / 20
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_pairing_sees_a_small_change_among_targets_that_differ_much() -> None:
    random = np.random.default_rng(2)
    first = random.normal(scale=10, size=(5, 30))
    second = first + 0.1 + random.normal(scale=0.1, size=first.shape)
    resamples = draw_resamples([str(unit) for unit in range(30)], num_seeds=5)
    ours, theirs = (resampled_means(values, resamples) for values in (second, first))
    paired = interval(float((second - first).mean()), ours - theirs)
    assert paired.is_clear
    assert interval(float(first.mean()), theirs).high - interval(float(first.mean()), theirs).low > 10 * (
        paired.high - paired.low
    )


def test_no_number_gives_no_interval() -> None:
    assert np.isnan(interval(float("nan"), np.zeros(3))).all()
    assert np.isnan(interval(1.0, np.full(3, np.nan))).all()
