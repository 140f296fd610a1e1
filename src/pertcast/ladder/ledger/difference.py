"""What two submissions differ in, and how far each metric moved between them: plain values in, plain values out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pertcast.ladder.ledger.records import METRICS

__all__ = ["Change", "compare_scores", "difference"]


class Change(NamedTuple):
    """How a metric moved.

    Attributes
    ----------
    before, now
        The two scores.
    improvement
        The difference, above 0 where `now` is better; ``None`` where the metric's direction is not known.
    relative
        `improvement` over the size of `before`; ``None`` where that is 0 or the direction is not known.
    """

    before: float
    now: float
    improvement: float | None
    relative: float | None


def compare_scores(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, Change]:
    """Return the change of each metric that both have.

    Examples
    --------
    >>> compare_scores({"mae": 0.25}, {"mae": 0.125})
    {'mae': Change(before=0.25, now=0.125, improvement=0.125, relative=0.5)}
    """
    changes = {}
    for name in (name for name in (*METRICS, *now) if name in before and name in now):
        better = METRICS[name].better if name in METRICS else None
        gained = None if better is None else (now[name] - before[name]) * (1.0 if better == "higher" else -1.0)
        relative = None if gained is None or before[name] == 0 else gained / abs(before[name])
        changes[name] = Change(before[name], now[name], gained, relative)
    return changes


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key → the two values, of every key whose values differ; ``None`` where one has none.

    Examples
    --------
    >>> difference({"loss": {"mae": 0.0, "de": 0.0}}, {"loss": {"mae": 1.0, "de": 0.0}})
    {'loss.mae': (0.0, 1.0)}
    """
    ours, theirs = dict(_leaves(now)), dict(_leaves(before))
    keys = dict.fromkeys((*theirs, *ours))
    return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}


def _leaves(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value
