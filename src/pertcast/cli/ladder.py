"""``pertcast ladder`` and ``pertcast ladder record``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from pertcast.ladder.ledger import Change, Ledger, Submission

__all__ = ["command", "ladder", "record"]

command = App(name="ladder")

_FEW = 12


@command.default
def ladder(
    *runs: Path,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """List every packed submission: its checkpoint and rung, what it changed, and what the site said.

    Each is found by the manifest beside its archive. Improvements are signed so that + is better: lower for MAE, higher
    for the others; scores of different seasons, panels or kinds are not compared.

    Example: `pertcast ladder out`

    Parameters
    ----------
    runs
        Folders to look in, all levels down, or archives; default: the working folder.
    json_
        Print all of it as JSON: hashes, configuration differences, histories, trade-offs.
    """
    from pertcast.cli.console import stdout_table
    from pertcast.ladder.ledger import read_ledger

    ledger = read_ledger(runs or (Path(),))
    if json_:
        print(json.dumps(ledger.as_json(), indent=1))
        return
    if not ledger.submissions:
        places = ", ".join(map(str, runs)) or "the working folder"
        print(f"no packed submission under {places}; `pertcast run` and `pertcast pack` make them")
    for number, item in enumerate(ledger.submissions, start=1):
        _print_submission(ledger, number, item)
    if rows := _trade_off_rows(ledger):
        names = list(dict.fromkeys(name for item in ledger.trade_offs() for name in item.moved))
        header = ("changed", "values", "from", *(_title(name) for name in names))
        stdout_table("Trade-offs seen so far (relative improvement, + is better)", header, rows)


def _print_submission(ledger: Ledger, number: int, item: Submission) -> None:
    state = "" if item.state == "packed" else f" ({item.state})"
    print(f"{number}  {item.rung or 'unknown rung'} · {item.kind or 'unknown model'} · {item.archive}{state}")
    print(f"   packed {item.packed_at} · {item.season or 'unknown season'} · sha256 {item.sha256 or 'unknown'}")
    if item.origin is not None:
        gone = "" if item.run_is_there else " (not there any more)"
        print(f"   checkpoint {item.run}{gone}, step {item.origin.step:,}")
    else:
        print("   checkpoint unknown: no manifest leads from the archive to a run")
    changed = ledger.changed(number)
    if changed is not None:
        print(f"   changed against {number - 1}: {_changed_text(changed)}")
    scores = item.scores
    if scores is None:
        print(f"   no scores yet: pertcast ladder record {item.archive} --overall ... --des ... --pds ... --mae ...")
    else:
        said = " · ".join(f"{_title(name)} {value:g}" for name, value in scores.metrics.items())
        entry = f", entry {scores.entry}" if scores.entry else ""
        more = f", {len(item.records)} records" if len(item.records) > 1 else ""
        print(f"   scores: {said} ({scores.source}{entry}, {scores.recorded_at}{more})")
        if scores.note:
            print(f"   note: {scores.note}")
    previous, first = ledger.previous(number), ledger.first(number)
    for other in dict.fromkeys(other for other in (previous, first) if other is not None):
        print(f"   improvement on {other}: {_moved_text(ledger.moved(other, number))}")


def _changed_text(changed: Mapping[str, tuple[Any, Any]]) -> str:
    texts = [f"{key} {_value(before)} → {_value(now)}" for key, (before, now) in changed.items()]
    more = f" and {len(texts) - _FEW} more (--json)" if len(texts) > _FEW else ""
    return ", ".join(texts[:_FEW]) + more if texts else "nothing in the configuration"


def _value(value: Any) -> str:
    return "–" if value is None else json.dumps(value) if not isinstance(value, str) else value


def _title(name: str) -> str:
    from pertcast.ladder.ledger import METRICS

    return METRICS[name].title if name in METRICS else name


def _moved_text(moved: Mapping[str, Change]) -> str:
    return " · ".join(f"{_title(name)} {_relative(change)}" for name, change in moved.items())


def _relative(change: Change | None) -> str:
    if change is None:
        return "–"
    if change.improvement is None:
        return f"{change.now - change.before:+.4g} (direction not known)"
    return f"{change.relative:+.1%}" if change.relative is not None else f"{change.improvement:+.4g} from 0"


def _trade_off_rows(ledger: Ledger) -> list[list[str]]:
    items = ledger.trade_offs()
    names = list(dict.fromkeys(name for item in items for name in item.moved))
    rows = []
    for item in items:
        moved = [_relative(item.moved.get(name)) for name in names]
        pair = f"{item.before} → {item.now}"
        if not item.changed:
            why = "configuration unknown" if item.changed is None else "nothing in the configuration"
            rows.append([why, "", pair, *moved])
        for place, (key, (before, now)) in enumerate((item.changed or {}).items()):
            rows.append(
                [
                    key,
                    f"{_value(before)} → {_value(now)}",
                    pair if place == 0 else "",
                    *(moved if place == 0 else ["〃"] * len(names)),
                ]
            )
    return rows


@command.command
def record(
    archive: Path,
    /,
    *,
    overall: float | None = None,
    des: float | None = None,
    pds: float | None = None,
    mae: float | None = None,
    entry: str | None = None,
    note: str | None = None,
    from_: Annotated[str | None, Parameter(name="--from")] = None,
) -> None:
    """Write down what the site said of a submission, in a JSON file beside its archive; earlier records stay.

    Example: `pertcast ladder record out/prediction.vcc --overall 0.12 --des 0.2 --pds 0.61 --mae 0.031 --entry 1234`
    Example: `vcc status 1234 --json | pertcast ladder record out/prediction.vcc --from -`

    Parameters
    ----------
    archive
        The .vcc, or a folder with just one: that of `pertcast run`, or the run that it came from.
    overall
        The overall score, as the site shows it; higher is better.
    des
        The differential expression score, 0 to 1; higher is better.
    pds
        The perturbation discrimination score, 0 to 1; higher is better.
    mae
        The mean absolute error; lower is better.
    entry
        The site's name of the submission.
    note
        Anything to remember.
    from_
        A file with what `vcc status ENTRY --json` printed (season 2026's metrics come from there), or what
        `pertcast score --json` said of held-out cells; - is the standard input.
    """
    from pertcast.errors import ConfigError
    from pertcast.files.artefacts import timestamp
    from pertcast.ladder.ledger import Record, find_submission, read_status, record_scores

    typed = {"overall": overall, "des": des, "pds": pds, "mae": mae}
    metrics = {name: value for name, value in typed.items() if value is not None}
    if metrics and from_ is not None:
        raise ConfigError("scores are given twice: --from and " + ", ".join(f"--{name}" for name in metrics))
    item = find_submission(archive)
    what: dict[str, Any] = {"metrics": metrics, "entry": entry}
    if from_ is not None:
        found = read_status(_read(from_), place=from_)
        what = {**found._asdict(), "entry": entry or found.entry}
    new = Record(item.sha256, recorded_at=timestamp(), note=note, submission=item.snapshot(), **what)
    path, added = record_scores(item.archive, new)
    said = " · ".join(f"{_title(name)} {value:g}" for name, value in new.metrics.items())
    print(f"{item.archive}: {said}" if added else f"{item.archive}: recorded already, nothing added")
    if added and (earlier := len(item.records)):
        print(f"{earlier} earlier record(s) of this archive stay in the history")
    print(path)


def _read(source: str) -> str:
    from pertcast.errors import DataError

    if source == "-":
        return sys.stdin.read()
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read ({error}); give a file, or - for the standard input") from None
