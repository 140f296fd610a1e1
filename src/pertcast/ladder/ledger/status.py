"""Scores out of a file: what ``vcc status --json`` says of an entry, or ``pertcast score --json`` of held-out cells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pertcast.errors import DataError
from pertcast.ladder.ledger.records import METRICS, Source

__all__ = ["StatusScores", "read_status"]

# vcc-cli 0.3.0: `vcc status --json` passes the entry through; fields that do not apply to its season are null
_OF_STATUS = {"score_avg": "overall", "de_score": "des", "pert_score": "pds", "mae_score": "mae_score"} | {
    name: name for name in METRICS if name.startswith("score_")
}
_ABOUT = ("rank", "partition", "panel_id", "anchor_version", "model_name", "submission_date", "status")
_OF_SCORE = ("overall", "des", "pds", "mae")


class StatusScores(NamedTuple):
    """What a file says of a submission."""

    metrics: dict[str, float]
    source: Source
    entry: str | None
    about: dict[str, Any]


def read_status(text: str, *, place: str) -> StatusScores:
    """Return the scores in the JSON of ``vcc status --json`` or ``pertcast score --json``.

    Parameters
    ----------
    text
        What the command printed.
    place
        Where it is from, for messages.

    Raises
    ------
    DataError
        If it is neither, or has no scores (yet).

    Examples
    --------
    >>> found = read_status('{"entry_id": "e1", "status": "published", "score_avg": 0.1, "rank": 7}', place="-")
    >>> found.metrics, found.entry, found.about["rank"]
    ({'overall': 0.1}, 'e1', 7)
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error}); give what `vcc status ENTRY --json` prints") from None
    if not isinstance(raw, Mapping):
        raise DataError(f"{place}: expected one JSON object; give what `vcc status ENTRY --json` prints")
    if isinstance(raw.get("overall"), Mapping):
        metrics = _numbers(raw["overall"], {name: name for name in _OF_SCORE})
        source: Source = "pertcast score"
        about: dict[str, Any] = {"season": raw["season"]} if raw.get("season") else {}
        entry = None
    else:
        metrics, source = _numbers(raw, _OF_STATUS), "vcc status"
        about = {name: raw[name] for name in _ABOUT if raw.get(name) is not None}
        entry = str(raw["entry_id"]) if raw.get("entry_id") is not None else None
    if not metrics:
        status = raw.get("status")
        why = f"its status is {status!r}; " if status else ""
        raise DataError(
            f"{place}: no scores in it ({why}expected one of {', '.join(_OF_STATUS)}); record it when it is scored"
        )
    return StatusScores(metrics, source, entry, about)


def _numbers(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float]:
    return {
        ours: float(raw[theirs])
        for theirs, ours in names.items()
        if isinstance(raw.get(theirs), int | float) and not isinstance(raw[theirs], bool)
    }
