"""What was said of an archive: a JSON file beside it that only grows, written whole or not at all.

Invariants: a record names the content that it is of by its hash, so a score never passes to an archive that was packed
later under the same name; what was recorded once stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pertcast.errors import CheckpointError, DataError, Problem
from pertcast.files.artefacts import read_json, write_json
from pertcast.files.lock import locked

__all__ = ["METRICS", "Metric", "Record", "read_records", "record_scores", "scores_path"]

Source = Literal["typed", "vcc status", "pertcast score"]


class Metric(NamedTuple):
    """A metric: what people call it, its unit, and which way is better (``None``: not known)."""

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
    """Scores of one archive, as they came.

    Attributes
    ----------
    archive_sha256
        The content that was scored.
    metrics
        Name (of :data:`METRICS`) → value.
    recorded_at
        UTC.
    source
        Typed in, read from ``vcc status --json``, or from ``pertcast score --json`` of held-out cells.
    entry, note
        The site's name of the submission, and what the user wrote.
    about
        What else came with the scores: rank, partition, panel, anchor set.
    submission
        What the archive was made by when this was recorded (``packed_at``, ``season``, ``origin``), so that the scores
        still say so when the archive has been replaced.
    """

    archive_sha256: str
    metrics: dict[str, float]
    recorded_at: str
    source: Source = "typed"
    entry: str | None = None
    note: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    submission: dict[str, Any] = field(default_factory=dict)

    def repeats(self, other: Record) -> bool:
        """Return whether this says the same as another, whenever they were made."""
        return (self.archive_sha256, self.metrics, self.source, self.entry, self.note, self.about) == (
            other.archive_sha256,
            other.metrics,
            other.source,
            other.entry,
            other.note,
            other.about,
        )


def scores_path(archive: Path) -> Path:
    """Return where the scores of an archive are kept: beside it."""
    return archive.with_name(f"{archive.name}.scores.json")


def read_records(archive: Path) -> tuple[Record, ...]:
    """Return what was recorded beside an archive, oldest first; nothing where nothing was.

    Raises
    ------
    DataError
        If the file cannot be read; it is left alone.
    """
    path = scores_path(archive)
    if not path.is_file():
        return ()
    try:
        return tuple(Record(**{**raw, "metrics": _ordered(raw["metrics"])}) for raw in read_json(path)["records"])
    except (CheckpointError, TypeError, KeyError, AttributeError) as error:
        remedy = "mend it by hand, or move it away and record the scores again"
        raise DataError(problems=[Problem(str(path), f"not the scores of an archive ({error})", remedy)]) from error


def _ordered(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in (*METRICS, *sorted(metrics)) if name in metrics}


def record_scores(archive: Path, record: Record) -> tuple[Path, bool]:
    """Append a record to those of an archive, unless the last one says the same.

    Returns
    -------
    The file, and whether it was added.

    Raises
    ------
    DataError
        If there are no scores in it, one is no number, or the file beside the archive cannot be read.
    """
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
