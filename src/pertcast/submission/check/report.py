"""The result of a check: problems, the pre-flight questions with their evidence, and facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.errors import DataError, Problem

Fact = int | float | str | tuple[str, ...] | None


class CheckItem(NamedTuple):
    """One pre-flight question: whether it holds (``None``: not asked), and the evidence."""

    question: str
    ok: bool | None
    evidence: str


@dataclass(frozen=True)
class Findings:
    """The findings of one family of rules."""

    problems: tuple[Problem, ...]
    items: tuple[CheckItem, ...]
    facts: Mapping[str, Fact] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    zero_rows: NDArray[np.int64] | None = None
    totals: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes
    ----------
    path, season
        What was checked, and against which season's rules.
    problems
        Everything that is wrong; empty for a valid prediction.
    checklist
        The pre-flight questions, in the season's order.
    facts
        ``cells``, ``genes``, ``controls``, ``targets``, ``contexts``, ``scale`` (``log1p``, ``counts``, ``mixed`` or
        ``None``), ``dtype``, ``stored_values``, ``max_value``, ``max_cell_sum``, ``median_cell_sum``, ``zero_cells``;
        those that could be read.
    notes
        Sentences that the user should read, overridden rules first.
    """

    path: str
    season: str
    problems: tuple[Problem, ...]
    checklist: tuple[CheckItem, ...] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the prediction is valid."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "path": self.path,
            "season": self.season,
            "ok": self.ok,
            "problems": [problem._asdict() for problem in self.problems],
            "checklist": [item._asdict() for item in self.checklist],
            "facts": {name: list(fact) if isinstance(fact, tuple) else fact for name, fact in self.facts.items()},
            "notes": list(self.notes),
        }


def problems_of(error: DataError, place: str) -> tuple[Problem, ...]:
    """Return the problems of an error, or its message as one problem at a place."""
    return error.problems or (Problem(place, str(error).removeprefix(f"{place}: ")),)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the right form.

    >>> counted(1, "cell"), counted(2000, "cell")
    ('1 cell', '2,000 cells')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def named(names: Iterable[object], *, limit: int = 10) -> str:
    """Return the first names in quotes, and the number of further ones.

    >>> named(["TP53", "MYC", "TET1"], limit=2)
    "'TP53', 'MYC' and 1 more"
    """
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(repr(name) for name in listed[:limit]) + (f" and {rest:,} more" if rest > 0 else "")
