"""The ledger: all submissions in order, what each changed, and how its scores moved.

Scores are compared only with scores of the same kind: the site's with the site's, held-out with held-out, and never
across seasons, partitions, panels or anchor sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import MANIFEST, read_manifest
from pertcast.ladder.ledger.scores import METRICS
from pertcast.ladder.ledger.submissions import Submission, find_artefacts, read_submissions, shortened


class Change(NamedTuple):
    """How a metric moved."""

    before: float  # The two scores
    now: float
    # The difference, above 0 where `now` is better; ``None`` if the metric's direction is not known
    improvement: float | None
    # `improvement` over the size of `before`; ``None`` if that is 0 or the direction is not known
    relative: float | None


def compare_scores(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, Change]:
    """Return the change of each metric that both have.

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
    """Return dotted key → the two values, for every key that differs; ``None`` if one lacks it.

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


_STAMPS = ("season", "partition", "panel_id", "anchor_version")


@dataclass(frozen=True)
class TradeOff:
    """Two consecutive scored submissions: what changed, and what moved."""

    before: int  # Their numbers in the ledger
    now: int
    # Dotted key → the two values; ``None`` if a configuration is not known
    changed: dict[str, tuple[Any, Any]] | None
    moved: dict[str, Change]  # Metric → its change


@dataclass(frozen=True)
class Ledger:
    """Submissions, oldest first; they are numbered from 1."""

    submissions: tuple[Submission, ...]

    def changed(self, number: int) -> dict[str, tuple[Any, Any]] | None:
        """Return what a submission changed against the one before it; ``None`` if unknown."""
        return _changed(self._at(number - 1), self._at(number)) if number > 1 else None

    def previous(self, number: int) -> int | None:
        """Return the number of the nearest earlier submission with comparable scores."""
        return next(reversed(self._comparable(number)), None)

    def first(self, number: int) -> int | None:
        """Return the number of the first submission with comparable scores."""
        return next(iter(self._comparable(number)), None)

    def moved(self, before: int | None, now: int) -> dict[str, Change]:
        """Return how each metric moved between two submissions; empty if one has no scores."""
        theirs, ours = self._at(before).scores if before else None, self._at(now).scores
        return compare_scores(theirs.metrics, ours.metrics) if theirs and ours else {}

    def trade_offs(self) -> list[TradeOff]:
        """Return what moved between each scored submission and the comparable one before it."""
        pairs = [(self.previous(number), number) for number in range(1, len(self.submissions) + 1)]
        return [
            TradeOff(before, now, _changed(self._at(before), self._at(now)), self.moved(before, now))
            for before, now in pairs
            if before is not None
        ]

    def by_key(self) -> dict[str, list[TradeOff]]:
        """Return dotted key → every comparison in which it was changed."""
        found: dict[str, list[TradeOff]] = {}
        for trade_off in self.trade_offs():
            for key in trade_off.changed or ():
                found.setdefault(key, []).append(trade_off)
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as JSON values."""
        return {
            "metrics": {name: metric._asdict() for name, metric in METRICS.items()},
            "submissions": [self._row(number) for number in range(1, len(self.submissions) + 1)],
            "trade_offs": [_trade_off_json(item) for item in self.trade_offs()],
            "by_key": {
                key: [
                    {
                        "before": item.before,
                        "now": item.now,
                        "values": list((item.changed or {})[key]),
                        "others_changed": len(item.changed or {}) - 1,
                        "moved": _moved_json(item.moved),
                    }
                    for item in items
                ]
                for key, items in self.by_key().items()
            },
        }

    def _at(self, number: int) -> Submission:
        return self.submissions[number - 1]

    def _comparable(self, number: int) -> list[int]:
        ours = self._at(number)
        return [other for other in range(1, number) if _are_comparable(self._at(other), ours)]

    def _row(self, number: int) -> dict[str, Any]:
        item, previous, first = self._at(number), self.previous(number), self.first(number)
        changed = self.changed(number)
        return {
            "number": number,
            "archive": str(item.archive),
            "sha256": item.sha256,
            "state": item.state,
            "packed_at": item.packed_at,
            "season": item.season,
            "run": str(item.run) if item.run else None,
            "run_is_there": item.run_is_there,
            "step": item.provenance.step if item.provenance else None,
            "weights": item.provenance.weights if item.provenance else None,
            "rung": item.rung,
            "kind": item.kind,
            "changed": None if changed is None else {key: list(values) for key, values in changed.items()},
            "scores": _record_json(item, -1),
            "history": [_record_json(item, place) for place in range(len(item.records))],
            "against_previous": {"number": previous, "moved": _moved_json(self.moved(previous, number))},
            "against_first": {"number": first, "moved": _moved_json(self.moved(first, number))},
        }


def _record_json(item: Submission, place: int) -> dict[str, Any] | None:
    if not item.records:
        return None
    return {name: value for name, value in asdict(item.records[place]).items() if name != "submission"}


def _moved_json(moved: dict[str, Change]) -> dict[str, Any]:
    return {name: change._asdict() for name, change in moved.items()}


def _trade_off_json(item: TradeOff) -> dict[str, Any]:
    changed = None if item.changed is None else {key: list(values) for key, values in item.changed.items()}
    return {"before": item.before, "now": item.now, "changed": changed, "moved": _moved_json(item.moved)}


def _are_comparable(before: Submission, now: Submission) -> bool:
    theirs, ours = before.scores, now.scores
    if theirs is None or ours is None:
        return False
    if (theirs.source == "pertcast score") != (ours.source == "pertcast score"):
        return False
    stamps = [
        {"season": item.season, **record.about} if item.season else record.about
        for item, record in ((before, theirs), (now, ours))
    ]
    return all(stamps[0][name] == stamps[1][name] for name in _STAMPS if all(name in stamp for stamp in stamps))


def _changed(before: Submission, now: Submission) -> dict[str, tuple[Any, Any]] | None:
    """Return the differences of two settings; a file with equal content at another path is no difference."""
    if before.provenance is None or now.provenance is None:
        return None
    changed = difference(before.provenance.experiment, now.provenance.experiment)
    if before.provenance.store == now.provenance.store:
        changed = {key: values for key, values in changed.items() if not key.startswith("datasets.")}
    else:
        changed["store"] = before.provenance.store[:12], now.provenance.store[:12]
    for name in ("genes", "targets"):
        if before.inputs.get(name) == now.inputs.get(name) is not None:
            changed.pop(f"submission.{name}", None)
    return changed


def read_ledger(places: Sequence[Path], *, depth: int = 8) -> Ledger:
    """Return every packed submission under some folders, oldest first.

    Parameters
    ----------
    places
        Folders, or archives themselves.
    depth
        How many levels of folders to enter; stores, runs and parts are not entered.

    Raises
    ------
    DataError
        If a place is not there, or scores beside an archive cannot be read.
    """
    return Ledger(tuple(read_submissions(find_artefacts(places, depth=depth))))


def find_submission(place: Path) -> Submission:
    """Return the submission of an archive, of a ``pertcast run`` folder, or of a run's folder."""
    weights = _weights_of_run(place)
    where = shortened(place.absolute().parent) if weights else place
    current = [item for item in read_ledger([where]).submissions if item.state != "replaced"]
    if place.is_file():
        current = [item for item in current if item.archive.resolve() == place.resolve()]
    if weights:
        current = [item for item in current if item.provenance and item.provenance.weights == weights]
    if len(current) != 1:
        names = ", ".join(str(item.archive) for item in current)
        found = f"{len(current)} archives ({names})" if current else "no archive"
        raise DataError(f"{place}: expected one packed submission, found {found}; name its .vcc")
    return current[0]


def _weights_of_run(place: Path) -> str | None:
    if not (place / MANIFEST).is_file():
        return None
    try:
        return read_manifest(place, kind="run").files.get("weights.safetensors")
    except CheckpointError as error:
        raise DataError(f"{error} (name the .vcc, or the run that it came from)") from None
