"""What a comparison with real cells found: numbers by context, the verdicts on them, JSON-able."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pertcast.files.expression import Scale
from pertcast.stats.realism import Likeness

__all__ = ["ContextRealism", "RealismReport"]


@dataclass(frozen=True)
class ContextRealism:
    """One context, or the whole prediction of a season with one.

    Attributes
    ----------
    context
        Its name, "" where the season has one.
    real
        Real control cells against other real ones: what to compare with.
    null
        The prediction's control cells against the same, as many as of `real`; ``None`` where it has none.
    targets
        A sample of its targets, the median of each number over them; ``None`` without targets.
    totals
        ``real``, ``null``, ``targets`` → quantiles .1, .5, .9 of a cell's counts; of sides in counts.
    """

    context: str
    real: Likeness
    null: Likeness | None
    targets: Likeness | None
    totals: Mapping[str, tuple[float, float, float]]

    @property
    def verdicts(self) -> tuple[tuple[str, bool, str], ...]:
        """Questions on the cells without an effect: what, whether it holds, and the numbers."""
        if self.null is None:
            return ()
        most = 1.5 * self.real.de_calls + 2
        middle, zeros = self.null.variance_ratio[1], 100 * self.null.zero_difference[1]
        return (
            (
                f"without an effect at most {most:.0f} genes are called DE",
                self.null.de_calls <= most,
                f"{self.null.de_calls}; real cells against real ones give {self.real.de_calls}",
            ),
            ("the median variance is 0.9 to 1.1 of the real one", 0.9 <= middle <= 1.1, f"{middle:.2f}"),
            ("zeros are within 2 points of the real ones", abs(zeros) <= 2, f"{zeros:+.1f} points"),
        )


@dataclass(frozen=True)
class RealismReport:
    """How real the cells of a prediction look.

    Attributes
    ----------
    path, against
        The prediction, and the file of real control cells.
    scale, target_sum
        The prediction's scale, and what both sides are normalised to.
    contexts
        One for each context.
    notes
        Sentences that the user should read.
    """

    path: str
    against: str
    scale: Scale
    target_sum: float
    contexts: tuple[ContextRealism, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values; a number that is not defined is null."""
        result: dict[str, Any] = _plain(dataclasses.asdict(self))
        for plain, context in zip(result["contexts"], self.contexts, strict=True):
            plain["verdicts"] = [list(verdict) for verdict in context.verdicts]
        return result


def _plain(value: object) -> Any:
    if isinstance(value, Likeness):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
