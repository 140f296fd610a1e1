"""Control cells are chosen without replacement, in the batches' proportions, by key alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertcast.errors import SubmissionError
from pertcast.submission.controls import choose_controls, proportional_counts


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=80), st.data(), st.integers(0, 1000))
def test_choice_is_stratified_distinct_and_keyed(batches: list[int], data: st.DataObject, seed: int) -> None:
    num = data.draw(st.integers(0, len(batches)))
    codes = np.array(batches)
    rows = np.arange(len(codes)) * 3 + 7
    chosen = choose_controls(rows, codes, num=num, seed=seed)
    assert len(chosen) == num
    assert len(set(chosen.tolist())) == num
    assert set(chosen.tolist()) <= set(rows.tolist())
    assert (np.diff(chosen) > 0).all()
    taken = codes[(chosen - 7) // 3]
    for batch in set(batches):
        due = Fraction(num * batches.count(batch), len(batches))
        assert abs(int((taken == batch).sum()) - due) < 1
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    again = choose_controls(rows[shuffled], codes[shuffled], num=num, seed=seed)
    assert again.tolist() == chosen.tolist()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.data())
def test_counts_are_largest_remainders(sizes: list[int], data: st.DataObject) -> None:
    num = data.draw(st.integers(0, sum(sizes)))
    counts = proportional_counts(np.array(sizes), num=num)
    # The slow twin: hand out what is left over, one by one, to the largest remainder.
    twin = [num * size // max(sum(sizes), 1) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(num * sizes[i] % max(sum(sizes), 1)), i))
    for i in order[: num - sum(twin)]:
        twin[i] += 1
    assert counts.tolist() == twin
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))


def test_other_seeds_choose_others() -> None:
    rows, codes = np.arange(200), np.repeat([0, 1], 100)
    one, other = (choose_controls(rows, codes, num=50, seed=seed) for seed in (1, 2))
    assert one.tolist() != other.tolist()


def test_more_controls_keep_those_of_fewer() -> None:
    rows, codes = np.arange(200), np.repeat([0, 1], 100)
    few, more = (set(choose_controls(rows, codes, num=num, seed=1).tolist()) for num in (40, 80))
    assert few < more


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(SubmissionError, match=r"11 control cells asked for, 10 are available.*at most 10"):
        choose_controls(np.arange(10), np.zeros(10, dtype=int), num=11, seed=0)
