"""The cells of each target: the requested number, or the same share of it under the season's cap.

Exact integer arithmetic: with alpha = min(1, (cap - controls) / sum(asked)), a target gets floor(alpha * asked) cells.
So the total never exceeds the cap, and no target is favoured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from pertcast.errors import Problem, SubmissionError

_MANY_CONTROLS = Fraction(1, 10)
_NUM_NAMED = 10


class BudgetRow(NamedTuple):
    """One line of the table: a target, its requested cells, and its cells."""

    target: str
    asked: int
    gets: int


@dataclass(frozen=True)
class Budget:
    """The cells of a prediction."""

    cap: int  # Most cells that the prediction may have, controls included
    num_controls: int  # Control cells
    alpha_fraction: Fraction  # The share of the cells asked for that each target gets, before rounding down; exact
    rows: tuple[BudgetRow, ...]  # One row a target, in the order asked for
    notes: tuple[str, ...] = ()  # Sentences that the user should read

    @property
    def alpha(self) -> float:
        """The share as a float, in (0, 1]."""
        return float(self.alpha_fraction)

    @property
    def cells(self) -> dict[str, int]:
        """Target → cells, in the order asked for."""
        return {row.target: row.gets for row in self.rows}

    @property
    def total(self) -> int:
        """All cells, controls included, at most the cap."""
        return self.num_controls + sum(row.gets for row in self.rows)


def room_for_controls(cap: int, *, num_controls: int | None = None, share: float = 0.05) -> int:
    """Return the room for control cells: a given number, or a share of the cap rounded down.

    >>> room_for_controls(100_000)
    5000
    >>> room_for_controls(100, share=0.29), room_for_controls(100, num_controls=7)
    (29, 7)
    """
    if num_controls is not None:
        return num_controls
    # The share as it is written in decimals: 0.29 * 100 is 28.999... in binary.
    return math.floor(Fraction(str(share)) * cap)


def plan_budget(requested: Mapping[str, int], *, cap: int, num_controls: int) -> Budget:
    """Divide the cap among targets.

    >>> plan_budget({"TP53": 60, "MYC": 41}, cap=80, num_controls=30).cells
    {'TP53': 29, 'MYC': 20}
    """
    _refuse_bad_input(requested, cap, num_controls)
    total_asked = sum(requested.values())
    alpha = min(Fraction(1), Fraction(cap - num_controls, total_asked))
    rows = tuple(BudgetRow(target, asked, math.floor(alpha * asked)) for target, asked in requested.items())
    starved = [row.target for row in rows if row.gets == 0]
    if starved:
        most = cap - -(-total_asked // min(requested.values()))
        remedy = (
            f"keep at most {most} control cells"
            if most >= 0
            else "no number of control cells would do: ask for fewer cells of the other targets"
        )
        names = ", ".join(starved[:_NUM_NAMED]) + (", ..." if len(starved) > _NUM_NAMED else "")
        raise SubmissionError(
            f"budget: {len(starved)} of {len(rows)} targets would get no cell ({names}): "
            f"{total_asked} cells asked for, room for {cap - num_controls} (cap {cap}, {num_controls} controls); "
            f"{remedy}"
        )
    return Budget(cap, num_controls, alpha, rows, _notes(cap, num_controls, alpha, total_asked))


def _refuse_bad_input(requested: Mapping[str, int], cap: int, num_controls: int) -> None:
    problems = [
        Problem(f"budget, target {target!r}", f"expected at least 1 cell, got {asked}", "correct the target list")
        for target, asked in requested.items()
        if asked < 1
    ]
    if not requested:
        problems.append(Problem("budget", "no target is asked for", "give a target list with at least one target"))
    if num_controls < 0:
        problems.append(Problem("budget", f"expected at least 0 control cells, got {num_controls}", "give 0 or more"))
    if num_controls >= cap:
        problems.append(
            Problem(
                "budget",
                f"{num_controls} control cells leave no room for targets under the cap of {cap} cells",
                f"keep at most {max(cap - len(requested), 0)} control cells",
            )
        )
    if problems:
        raise SubmissionError(problems=problems)


def _notes(cap: int, num_controls: int, alpha: Fraction, total_asked: int) -> tuple[str, ...]:
    notes = []
    if num_controls > _MANY_CONTROLS * cap:
        notes.append(
            f"{num_controls} control cells are {num_controls / cap:.1%} of the cap of {cap} cells; "
            "more than 10 % is rarely worth the room that it takes from targets"
        )
    if alpha < 1:
        notes.append(
            f"{total_asked} cells asked for, room for {cap - num_controls}: "
            f"each target gets {float(alpha):.4f} of its cells, rounded down"
        )
    return tuple(notes)
