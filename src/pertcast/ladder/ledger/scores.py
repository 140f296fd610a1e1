"""Recorded scores of an archive, in a JSON file beside it that only grows and is written atomically.

Invariants: a record names its archive by hash, so a score never passes to a later archive of the same name. Recorded
scores are never changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pertcast.errors import CheckpointError, DataError, Problem
from pertcast.files.artefacts import locked, read_json, write_json

Source = Literal["typed", "vcc status", "pertcast score"]


class Metric(NamedTuple):
    """A metric: its name, its unit, and which way is better (``None``: unknown)."""

    title: str
    unit: str
    better: Literal["higher", "lower"] | None


_SCALED = "scaled: 0 the context-mean baseline, 1 a split-half replicate of the experiment"

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "overall": Metric("Overall", "as the site shows it", "higher"),
        "des": Metric("DES", "share of the real DE genes that are found, 0 to 1", "higher"),
        "pds": Metric("PDS", "1 less the rank of a perturbation's own effect among all, 0 to 1", "higher"),
        "mae": Metric("MAE", "mean over genes of the pseudobulk's error, log1p", "lower"),
        "mae_score": Metric("MAE score", "as the site shows it", None),
        "score_pds": Metric("Perturbation discrimination", _SCALED, "higher"),
        "score_mse": Metric("Expression accuracy", _SCALED, "higher"),
        "score_nmae": Metric("DE log-FC accuracy", _SCALED, "higher"),
        "score_fid": Metric("DE direction fidelity", _SCALED, "higher"),
        "score_reach": Metric("DE direction reach", _SCALED, "higher"),
        "score_jac": Metric("DE significance overlap", _SCALED, "higher"),
    }
)
"""The metrics of both seasons, in the order of tables; the scaled ones of season 2026 are named as `vcc` names them."""


@dataclass(frozen=True)
class Record:
    """Scores of one archive, as received."""

    archive_sha256: str  # The content that was scored
    metrics: dict[str, float]  # Name (of :data:`METRICS`) → value
    recorded_at: str  # UTC
    # Typed in, read from ``vcc status --json``, or from ``pertcast score --json`` of held-out cells
    source: Source = "typed"
    entry: str | None = None  # The site's name of the submission, and what the user wrote
    note: str | None = None
    # What else came with the scores: rank, partition, panel, anchor set
    about: dict[str, Any] = field(default_factory=dict)
    # What the archive was made by when this was recorded (``packed_at``, ``season``, ``origin``), so that the
    # scores still say so when the archive has been replaced
    submission: dict[str, Any] = field(default_factory=dict)

    def repeats(self, other: Record) -> bool:
        """Return whether this has the same content as another, whenever they were made."""
        return (self.archive_sha256, self.metrics, self.source, self.entry, self.note, self.about) == (
            other.archive_sha256,
            other.metrics,
            other.source,
            other.entry,
            other.note,
            other.about,
        )


def scores_path(archive: Path) -> Path:
    """Return the path of an archive's scores, beside it."""
    return archive.with_name(f"{archive.name}.scores.json")


def read_records(archive: Path) -> tuple[Record, ...]:
    """Return the records beside an archive, oldest first."""
    path = scores_path(archive)
    if not path.is_file():
        return ()
    try:
        return tuple(Record(**{**raw, "metrics": _ordered(raw["metrics"])}) for raw in read_json(path)["records"])
    except (CheckpointError, TypeError, KeyError, AttributeError) as error:
        remedy = "correct it by hand, or move it away and record the scores again"
        raise DataError(problems=[Problem(str(path), f"not the scores of an archive ({error})", remedy)]) from error


def _ordered(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in (*METRICS, *sorted(metrics)) if name in metrics}


def record_scores(archive: Path, record: Record) -> tuple[Path, bool]:
    """Append a record, unless the last one has the same content."""
    wrong = [f"{name} = {value}" for name, value in record.metrics.items() if not math.isfinite(value)]
    if wrong or not record.metrics:
        what = f"expected numbers, got {', '.join(wrong)}" if wrong else "there is no score to record"
        raise DataError(f"{archive}: {what}; give --overall, --des, --pds or --mae, or --from a file")
    path = scores_path(archive)
    with locked(path):
        records = read_records(archive)
        if records and records[-1].repeats(record):
            return path, False
        write_json(path, {"archive": archive.name, "records": [asdict(item) for item in (*records, record)]})
    return path, True


# vcc-cli 0.3.0: `vcc status --json` passes the entry through; fields that do not apply to its season are null
_OF_STATUS = {"score_avg": "overall", "de_score": "des", "pert_score": "pds", "mae_score": "mae_score"} | {
    name: name for name in METRICS if name.startswith("score_")
}
_ABOUT = ("rank", "partition", "panel_id", "anchor_version", "model_name", "submission_date", "status")
_OF_SCORE = ("overall", "des", "pds", "mae")


class StatusScores(NamedTuple):
    """The scores in a status file."""

    metrics: dict[str, float]
    source: Source
    entry: str | None
    about: dict[str, Any]


def read_status(text: str, *, place: str) -> StatusScores:
    """Return the scores in the JSON of ``vcc status --json`` or ``pertcast score --json``.

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
