"""The budget never exceeds the cap, is exact when nothing is scaled, and is the formula."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pertcast.errors import SubmissionError
from pertcast.files.season_lists import read_targets
from pertcast.seasons import season
from pertcast.submission.cell_budget import plan_budget, room_for_controls

requests = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 5000), min_size=1, max_size=30)


@given(requests, st.integers(1, 100_000), st.integers(0, 100_000))
def test_it_is_the_formula_or_a_refusal_that_holds(requested: dict[str, int], cap: int, num_controls: int) -> None:
    assume(num_controls < cap)
    total = sum(requested.values())
    room = cap - num_controls
    # The slow twin: integers alone, floor(min(1, room / total) * n).
    twin = {target: n if total <= room else n * room // total for target, n in requested.items()}
    if min(twin.values()) == 0:
        with pytest.raises(SubmissionError, match="would get no cell"):
            plan_budget(requested, cap=cap, num_controls=num_controls)
        return
    budget = plan_budget(requested, cap=cap, num_controls=num_controls)
    assert budget.cells == twin
    assert list(budget.cells) == list(requested)
    assert budget.total <= cap
    assert budget.total == num_controls + sum(twin.values())
    assert budget.alpha_fraction == min(Fraction(1), Fraction(room, total))
    assert 0 < budget.alpha <= 1
    if total <= room:
        assert budget.cells == requested


@given(requests, st.integers(1, 20_000))
def test_the_number_of_controls_that_is_named_would_do_and_one_more_would_not(
    requested: dict[str, int], cap: int
) -> None:
    with_most = cap - math.ceil(sum(requested.values()) / min(requested.values()))
    assume(0 <= with_most < cap - 1)
    assert min(plan_budget(requested, cap=cap, num_controls=with_most).cells.values()) >= 1
    with pytest.raises(SubmissionError, match=rf"keep at most {with_most} control cells"):
        plan_budget(requested, cap=cap, num_controls=with_most + 1)


def test_a_starved_target_is_named() -> None:
    with pytest.raises(SubmissionError, match=r"1 of 2 targets would get no cell \(tiny\).*keep at most 500 control"):
        plan_budget({"big": 999, "tiny": 1}, cap=1500, num_controls=600)


def test_no_controls_would_do_either() -> None:
    with pytest.raises(SubmissionError, match="no number of control cells would do"):
        plan_budget({"big": 999, "tiny": 1}, cap=500, num_controls=0)


@pytest.mark.parametrize(
    ("requested", "num_controls", "message"),
    [
        ({"a": 1}, 10, "leave no room"),
        ({"a": 1}, 11, "leave no room"),
        ({"a": 1}, -1, "at least 0 control cells"),
        ({}, 1, "no target"),
        ({"a": 0, "b": -2}, 1, "2 problems"),
    ],
)
def test_bad_input_is_refused(requested: dict[str, int], num_controls: int, message: str) -> None:
    with pytest.raises(SubmissionError, match=message):
        plan_budget(requested, cap=10, num_controls=num_controls)


def test_notes_speak_of_many_controls_and_of_scaling() -> None:
    assert plan_budget({"a": 50}, cap=100, num_controls=10).notes == ()
    many, scaled = plan_budget({"a": 100}, cap=100, num_controls=11).notes
    assert "11.0% of the cap" in many
    assert "0.8900 of its cells" in scaled


def test_room_for_controls() -> None:
    assert room_for_controls(100_000) == 5000
    assert room_for_controls(100_000, num_controls=12) == 12
    assert [room_for_controls(100, share=share) for share in (0.29, 0.07, 0.0, 0.999)] == [29, 7, 0, 99]


def test_rows_are_a_table_of_the_real_list(shared_data: Path) -> None:
    rules = season("vcc2025", {"max_cells": 50_000})
    targets = read_targets(shared_data / "vcc2025" / "pert_counts_Validation.csv", rules)
    budget = plan_budget(targets.requested(), cap=rules.max_cells, num_controls=2_500)
    assert budget.rows[0]._asdict() == {"target": "SH3BP4", "asked": 2925, "gets": 2925 * 47_500 // 60_751}
    assert 50_000 - 50 < budget.total <= 50_000
