"""The commands around scores: score, compare, calibrate, adapt, ladder, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from pertcast.cli.app import ForceOption, RulesOption, SeasonOption, SetOption, parse_rules

if TYPE_CHECKING:
    from pertcast.ladder.ledger import Change, Ledger, Submission
    from pertcast.ladder.score import Score


ladder_app = App(name="ladder")

_FEW = 12


@ladder_app.default
def ladder(*runs: Path, json_: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """List every packed submission: its checkpoint and rung, what it changed, and its scores.

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
    if item.provenance is not None:
        gone = "" if item.run_is_there else " (not there any more)"
        print(f"   checkpoint {item.run}{gone}, step {item.provenance.step:,}")
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


@ladder_app.command
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
    """Record the scores that the site gave a submission, in a JSON file beside its archive. Earlier records stay.

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


def adapt(
    run: Path,
    experiment: Path,
    /,
    *,
    out: Path,
    trainable: Annotated[str | None, Parameter(name="--trainable")] = None,
    store: Path | None = None,
    set_: SetOption = None,
) -> None:
    """Adapt a trained run to a new cell line from a few controls and targets, by training a few parameters.

    The result is an ordinary run of the new line's cells, which `pertcast generate` takes; everything that does not
    learn is the trained run's, to the bit. Run the same command again to resume.

    Example: `pertcast adapt run new_line.toml --out adapted --trainable offset,context`

    Parameters
    ----------
    run
        The folder that `pertcast train` wrote.
    experiment
        The experiment file of the new line's cells; targets that it holds out as val say when steps stop. Model and
        features are the run's; so are the loss and [train] where the file has none.
    out
        The folder of the adapted run.
    trainable
        What learns, with commas: offset (the bias of the last layer, in closed form, without steps), context (the
        line's own row of the context embedding), batch (rows of its new batches), bias (of the last layer, by steps),
        last (all of it), gain (how much of what the network adds to control cells, by least squares, without steps),
        lora:R (low-rank changes of the backbone's attention, R a rank). Default: offset.
    store
        The folder that `pertcast prepare` wrote of the new line; default: OUT_store beside the adapted run, prepared if
        need be.
    """
    from pertcast.cli.console import Console
    from pertcast.config import load_experiment
    from pertcast.data.prepare import prepare
    from pertcast.train.adapt import adapt as fit
    from pertcast.train.new_line import adapted_experiment

    overrides = [*(set_ or ()), *([f"adapt.trainable={trainable!r}"] if trainable is not None else [])]
    resolved, console = adapted_experiment(run, load_experiment(experiment, overrides, command="adapt")), Console()
    if store is None:
        store = prepare(resolved, out.with_name(f"{out.name}_store"), progress=console)
    print(fit(run, resolved, store, out, progress=console))


def calibrate(
    run: Path,
    /,
    *,
    folds: Annotated[int, Parameter(name="--folds")] = 0,
    fold_steps: Annotated[int | None, Parameter(name="--fold-steps")] = None,
    store: Path | None = None,
    set_: SetOption = None,
) -> None:
    """Choose how large effects and how wide cells should be, on targets held out of the fit.

    What scores best by the official metrics of season 2025 on the run's validation targets is kept in the run, as
    calibration.json; `pertcast generate RUN --set generate.calibrated=true` applies it. Targets that test are never
    looked at. Where nothing beats what the run predicts by more than a standard error, nothing changes, and it says so.

    Example: `pertcast calibrate run --set generate.cells=sparse`

    Parameters
    ----------
    run
        The folder that `pertcast train` wrote.
    folds
        Train so many networks again beside the run (RUN_folds), each without its share of the training targets, and
        choose on those; default: the run's own validation targets.
    fold_steps
        Steps of each of them; default: as many as the run was to take.
    store
        The store, if it has moved since training.
    """
    from pertcast.cli.console import Console
    from pertcast.ladder.calibration import calibrate as choose

    print(
        choose(
            run, store_path=store, overrides=list(set_ or ()), folds=folds, fold_steps=fold_steps, progress=Console()
        )
    )


def compare(
    *experiments: Path,
    out: Path,
    rungs: str | None = None,
    models: str = "",
    seeds: int = 5,
    folds: int = 0,
    jobs: int = 1,
    set_: SetOption = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Compare rungs, models and experiments on held-out perturbations, with intervals over targets and seeds.

    Every candidate is trained, and its cells made and scored with season 2025's metrics, on the same folds and seeds;
    finished trials are skipped, so the same command resumes after an interrupt, or adds seeds. The result is a
    table and a verdict in words (comparison.md), a chart (comparison.svg) and all numbers (comparison.json).

    Example: `pertcast compare experiment.toml --rungs c1,c2,c3,c4 --seeds 5 --folds 5 --out comparison`

    Parameters
    ----------
    experiments
        Experiment files. Several are compared as they are, one by its rungs.
    out
        The folder of the comparison.
    rungs
        Rungs of the ladder, with commas between them; "none" for the experiment itself. Default: all four for one
        experiment, none for several.
    models
        Models beside them, as `model.kind` names them, with commas between them: mean,ridge.
    seeds
        How many seeds, from 0.
    folds
        Into how many folds to divide the perturbations, each held out once; default: those that [fewshot] lists as
        test.
    jobs
        How many trials at a time; where there are accelerators, each takes the next one.
    json_
        Print everything as JSON.
    """
    import json

    from pertcast.cli.console import Console, stdout_table
    from pertcast.config import RUNGS
    from pertcast.errors import ConfigError
    from pertcast.ladder.compare import candidates_of
    from pertcast.ladder.compare import compare as compute
    from pertcast.ladder.comparison import METRICS, REFERENCES, TITLES, level_rows, verdict

    if not experiments:
        raise ConfigError("pertcast compare: give at least one experiment file")
    if rungs is None:
        chosen = list(RUNGS) if len(experiments) == 1 else []
    else:
        chosen = [] if rungs == "none" else [name.strip() for name in rungs.split(",")]
    if unknown := [name for name in chosen if name not in RUNGS]:
        raise ConfigError(f"--rungs: expected some of {', '.join(RUNGS)}, got {', '.join(unknown)}")
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds, --jobs: expected at least 1, got {seeds} and {jobs}")
    found = compute(
        candidates_of(experiments, rungs=chosen, models=[name.strip() for name in models.split(",") if name.strip()]),
        out,
        seeds=seeds,
        folds=folds,
        jobs=jobs,
        overrides=set_ or (),
        progress=Console(),
    )
    if json_:
        print(json.dumps(found.as_json(), indent=1))
        return
    stdout_table(
        f"{len(found.units)} held-out units, {found.num_seeds} seed(s)",
        ("", *(TITLES[metric] for metric in METRICS)),
        list(level_rows(found.levels, (*found.candidates, *REFERENCES))),
    )
    for sentence in verdict(found):
        print(f"· {sentence}")
    print(out / "comparison.md")


def report(
    run: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    truth: Annotated[Path | None, Parameter(name="--truth")] = None,
    ladder: Annotated[Path | None, Parameter(name="--ladder")] = None,
    force: ForceOption = False,
) -> None:
    """Write one self-contained HTML page about a run that opens offline.

    The run in numbers, the check's verdict, the curve of each term of the loss, effect sizes, cells in PCA space, top
    DE genes, volcanoes, the budget, and the ladder of submissions. What is not there is named, with what makes it.

    Example: `pertcast report out/c2 --truth held_out.h5ad`

    Parameters
    ----------
    run
        The folder of `pertcast run`, or that of `pertcast train`.
    out
        The page; default: report.html in that folder.
    truth
        Real cells of the predicted targets, an h5ad file with control cells.
    ladder
        Where to look for packed submissions; default: the parent of the run's folder.
    """
    from pertcast.cli.console import Console
    from pertcast.ladder.report import write_report

    print(write_report(run, out, truth=truth, ladder=ladder, force=force, progress=Console()))


def score(
    predicted: Path,
    real: Path,
    /,
    *,
    season: SeasonOption = "vcc2025",
    baseline: Annotated[Path | None, Parameter(name="--baseline")] = None,
    baseline_from: Annotated[Path | None, Parameter(name="--baseline-from")] = None,
    ceiling: Annotated[bool, Parameter(name="--ceiling", negative="")] = False,
    set_: RulesOption = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Score predicted cells against held-out real ones with the season's official metrics.

    Season 2025: MAE, PDS and DES, equal to `cell-eval run --profile vcc`, and with a baseline the overall, equal to
    `cell-eval score`; what is computed of the real cells is kept for the next time under their content's hash. Season
    2026: through cell-eval2 (extra `pertcast[score]`).

    Example: `pertcast score prediction.h5ad held_out.h5ad --season vcc2025 --baseline baseline.h5ad`

    Parameters
    ----------
    predicted
        Predicted cells, an h5ad file with control cells (season 2026: without).
    real
        Real cells of the same targets and genes, with control cells.
    baseline
        What the overall is relative to: an h5ad (as `cell-eval baseline` writes), the JSON of an earlier score, or
        cell-eval's agg_results.csv.
    baseline_from
        Training cells, an h5ad file with control cells: the overall is relative to their mean, as `cell-eval baseline`
        makes it. In place of --baseline.
    ceiling
        Score one half of the real cells for the other half, too.
    json_
        Print the score as JSON.
    """
    from pertcast.cli.console import Console
    from pertcast.errors import ConfigError
    from pertcast.ladder.mean_baseline import TrainingMean
    from pertcast.ladder.score import score as compute

    if baseline_from is not None and baseline is not None:
        raise ConfigError("--baseline and --baseline-from both say what the overall is relative to; give one of them")
    found = compute(
        predicted,
        real,
        season=season,
        rules=parse_rules(set_),
        baseline=TrainingMean(baseline_from) if baseline_from is not None else baseline,
        ceiling=ceiling,
        progress=Console(),
    )
    if json_:
        print(json.dumps(found.as_json(), indent=1))
    else:
        print_score(found)


def print_score(found: Score) -> None:
    """Print a score: the means, then every target."""
    from pertcast.cli.console import stdout_table

    columns = list(dict.fromkeys(name for values in found.targets.values() for name in values))
    stdout_table(
        f"{found.season}: {len(found.targets)} targets",
        ("target", *columns),
        [(name, *(_shown(values.get(column)) for column in columns)) for name, values in found.targets.items()],
    )
    beside = [("baseline", found.baseline), ("relative", found.relative), ("ceiling", found.ceiling)]
    there = [(name, values) for name, values in beside if values]
    names = list(dict.fromkeys([*found.overall, *(name for _, values in there for name in values)]))
    stdout_table(
        "in all",
        ("metric", "score", *(name for name, _ in there)),
        [(name, _shown(found.overall.get(name)), *(_shown(values.get(name)) for _, values in there)) for name in names],
    )
    for note in found.notes:
        print(f"· {note}")


def _shown(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
