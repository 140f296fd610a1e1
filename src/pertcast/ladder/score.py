"""Score predicted cells against held-out real ones with the season's official metrics.

Season 2025 is computed here and equals `cell-eval run --profile vcc` and `cell-eval score`. Season 2026 uses cell-
eval2.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from pertcast.errors import ConfigError, DataError, Problem
from pertcast.ladder.mean_baseline import TrainingMean, training_mean_side
from pertcast.ladder.scored_side import PseudobulkStats, cache_folder, read_halves, read_side
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.seasons import season as season_of
from pertcast.stats.metrics import (
    BEST,
    de_overlap,
    discrimination,
    effect_correlation,
    mean_absolute_error,
    overall,
    relative,
    spearman_brown,
)


def score_by_cell_eval2(
    predicted: Path, real: Path, *, rules: Season, progress: Progress = SILENT
) -> tuple[dict[str, float], dict[str, dict[str, float]], list[str]]:
    """Score each context with cell-eval2; return means, scores by target, and notes."""
    official = _import_cell_eval2(rules)
    for path in (predicted, real):
        if not path.is_file():
            raise DataError(f"{path}: no such file; give the path of a .h5ad file")
    config = dataclasses.replace(
        official.EvalConfig.from_preset(rules.name),
        pert_col=rules.pert_column,
        control=rules.control_label,
        outdir=None,
    )
    sides = ad.read_h5ad(predicted), ad.read_h5ad(real)
    contexts = _contexts(sides, (predicted, real), rules.context_column)
    aggregates: list[dict[str, float]] = []
    targets: dict[str, dict[str, float]] = {}
    with progress.task("score with cell-eval2", len(contexts), "contexts") as advance:
        for context in contexts:
            ours, theirs = (
                (side[(side.obs[rules.context_column].astype(str) == context).to_numpy()].copy() if context else side)
                for side in sides
            )
            own = ours.obs[rules.pert_column].astype(str)
            if rules.control_label not in set(own):
                is_control = theirs.obs[rules.pert_column].astype(str) == rules.control_label
                joined = ad.concat([ours, theirs[is_control.to_numpy()]], index_unique="-")
                ours = joined[:, ours.var_names].copy() if set(joined.var_names) == set(ours.var_names) else ours
            try:
                table = official.compute_metrics(ours, theirs, config=config)
            except ValueError as error:
                raise DataError(f"{predicted}: cell-eval2 refuses it: {error}") from error
            aggregates.append({row["metric"]: row["mean"] for row in official.aggregate_metrics(table).to_dicts()})
            for row in table.to_dicts():
                name = row["perturbation"] if len(contexts) == 1 else f"{context}/{row['perturbation']}"
                targets.setdefault(name, {})[row["metric"]] = row["value"]
            advance(1)
    means: dict[str, float] = {}
    notes = []
    for name in dict.fromkeys(name for values in aggregates for name in values):
        known = {
            context: values[name]
            for context, values in zip(contexts, aggregates, strict=True)
            if values.get(name) is not None and not np.isnan(values[name])
        }
        means[name] = float(np.mean(list(known.values()))) if known else float("nan")
        missing = [context for context in contexts if context not in known]
        if missing and known:
            notes.append(f"{name} is missing in context {', '.join(missing)}: its mean is over {', '.join(known)}")
        elif missing:
            notes.append(f"{name} has no value in any context")
    return means, targets, notes


def _import_cell_eval2(rules: Season) -> Any:
    try:
        return importlib.import_module("cell_eval2")
    except ImportError as error:
        raise ConfigError(
            f"season {rules.name} is scored by cell-eval2, which is not installed ({error}); "
            "install it with: pip install 'pertcast[score]'"
        ) from error


def _contexts(sides: tuple[Any, Any], places: tuple[Path, Path], column: str | None) -> list[str]:
    """Return the contexts of both files; one nameless context if neither has any."""
    found = [set(side.obs[column].astype(str)) if column in side.obs else set() for side in sides]
    if found[0] != found[1]:
        ours, theirs = (", ".join(sorted(names)) or "none" for names in found)
        raise DataError(
            f"{places[0]}: expected contexts {theirs} (of {places[1]}), got {ours}; score files of the same"
        )
    return sorted(found[0]) or [""]


_CELL_EVAL_NAMES = {"mae": "mae", "discrimination_score_l1": "pds", "overlap_at_N": "des"}


@dataclass(frozen=True)
class Score:
    """The score of a prediction."""

    season: str  # Whose metrics these are
    # Metric → mean over targets; with a baseline ``overall`` too, which clips each metric at 0
    overall: dict[str, float]
    targets: dict[str, dict[str, float]]  # Target → metric → value
    # Metric → how far it has come from the baseline (0) to the best (1), not clipped; empty without a
    # baseline
    relative: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)  # Metric → the baseline's value; empty without one
    # Metric → what one half of the real cells scores for the other (``des``, ``pds``, ``mae``, ...), and as
    # ``des_full``, ``pds_full`` what that means at full depth (Spearman-Brown); empty if not asked for
    ceiling: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # Sentences that a reader of the score should know

    def as_json(self) -> dict[str, Any]:
        """Return the score as JSON values; NaN becomes ``None``."""
        return {
            "season": self.season,
            "overall": _plain(self.overall),
            "targets": {name: _plain(values) for name, values in self.targets.items()},
            "relative": _plain(self.relative),
            "baseline": _plain(self.baseline),
            "ceiling": _plain(self.ceiling),
            "notes": list(self.notes),
        }


def score(
    predicted: Path,
    real: Path,
    *,
    season: str | Season = "vcc2025",
    rules: Mapping[str, int | str] | None = None,
    baseline: Path | TrainingMean | None = None,
    ceiling: bool = False,
    progress: Progress = SILENT,
) -> Score:
    """Score predicted cells against real ones of the same targets and genes."""
    rules_of = season if isinstance(season, Season) else season_of(season)
    rules_of = rules_of.override(rules or {})
    for line in rules_of.describe_overrides():
        progress.note(line)
    if rules_of.scorer != "cell-eval run --profile vcc":
        if baseline is not None or ceiling:
            raise ConfigError(
                f"season {rules_of.name}: a baseline and a ceiling are for season vcc2025; leave them out"
            )
        values, targets, missing = score_by_cell_eval2(predicted, real, rules=rules_of, progress=progress)
        return Score(rules_of.name, values, targets, notes=(*rules_of.describe_overrides(), *missing))
    truth = read_side(real, rules_of, cache=cache_folder(), progress=progress)
    scored = compare_sides(read_side(predicted, rules_of, progress=progress), truth, places=(predicted, real))
    values = _means(scored)
    against = _read_baseline(baseline, truth, real, rules_of, progress) if baseline is not None else {}
    if against:
        values["overall"] = overall(values, against)
    return Score(
        rules_of.name,
        values,
        scored,
        relative=relative(values, against) if against else {},
        baseline=against,
        ceiling=_ceiling(real, rules_of, progress) if ceiling else {},
        notes=(*rules_of.describe_overrides(), *_notes(scored)),
    )


def compare_sides(
    predicted: PseudobulkStats,
    real: PseudobulkStats,
    *,
    places: tuple[Path | str, Path | str] = ("prediction", "truth"),
) -> dict[str, dict[str, float]]:
    """Return the metrics of each target."""
    _refuse_other_labels(predicted, real, places)
    found = de_overlap(real.significant, predicted.significant, predicted.log2_fold_change)
    position = {gene: number for number, gene in enumerate(real.genes)}
    own_gene = np.array([position.get(pert, -1) for pert in real.perts], dtype=np.int64)
    real_effects, predicted_effects = real.effects, predicted.effects
    columns = {
        "mae": mean_absolute_error(real.means_log1p, predicted.means_log1p),
        "pds": discrimination(real_effects, predicted_effects, own_gene),
        "des": found.score,
        "effect_correlation": effect_correlation(real_effects, predicted_effects),
        "num_de_real": found.num_real,
        "num_de_predicted": found.num_predicted,
        "num_de_shared": found.num_shared,
        "num_de_tied": found.num_tied,
        "num_cells_real": real.num_cells,
        "num_cells_predicted": predicted.num_cells,
    }
    return {pert: {name: column[row].item() for name, column in columns.items()} for row, pert in enumerate(real.perts)}


def _refuse_other_labels(
    predicted: PseudobulkStats, real: PseudobulkStats, places: tuple[Path | str, Path | str]
) -> None:
    problems = []
    for name, ours, theirs in (("targets", predicted.perts, real.perts), ("genes", predicted.genes, real.genes)):
        for what, found in (("lacks", sorted(set(theirs) - set(ours))), ("has too", sorted(set(ours) - set(theirs)))):
            if found:
                shown = ", ".join(found[:5]) + (" ..." if len(found) > 5 else "")
                remedy = f"score files of the same {name}"
                problems.append(
                    Problem(str(places[0]), f"it {what} {len(found)} {name} of {places[1]}: {shown}", remedy)
                )
    if not problems and predicted.genes != real.genes:
        first = next(n for n, (a, b) in enumerate(zip(predicted.genes, real.genes, strict=True)) if a != b)
        message = (
            f"gene order differs at position {first}: expected {real.genes[first]!r}, got {predicted.genes[first]!r}"
        )
        problems.append(Problem(f"{places[0]}, var_names", message, "bring the genes of both files into one order"))
    if problems:
        raise DataError(problems=problems)


def _means(targets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = next(iter(targets.values()))
    columns = {name: np.array([values[name] for values in targets.values()], dtype=np.float64) for name in names}
    means = {}
    for name, column in columns.items():
        known = column[~np.isnan(column)]
        means[name] = float(known.mean()) if len(known) else float("nan")
    return {"mae": means.pop("mae"), "pds": means.pop("pds"), "des": means.pop("des"), **means}


def _notes(targets: Mapping[str, Mapping[str, float]]) -> list[str]:
    notes = []
    if silent := sum(values["num_de_real"] == 0 for values in targets.values()):
        notes.append(
            f"{silent} of {len(targets)} targets have no DE gene in the real cells: their DES is 0 for any prediction"
        )
    if tied := [name for name, values in targets.items() if values["num_de_tied"]]:
        notes.append(
            f"{len(tied)} targets have equal fold changes where their predicted DE genes are cut "
            f"({', '.join(tied[:5])}): their DES depends on the order of those genes"
        )
    return notes


def _ceiling(real: Path, rules: Season, progress: Progress) -> dict[str, float]:
    first, second = read_halves(real, rules, progress=progress)
    values = _means(compare_sides(second, first))
    return {
        **{name: values[name] for name in ("mae", "pds", "des", "effect_correlation")},
        **{f"{name}_full": spearman_brown(values[name]) for name in ("pds", "des", "effect_correlation")},
    }


def _read_baseline(
    given: Path | TrainingMean, truth: PseudobulkStats, real: Path, rules: Season, progress: Progress
) -> dict[str, float]:
    """Return the metrics of a baseline, scored here or read from a file."""
    path = given.cells if isinstance(given, TrainingMean) else given
    if isinstance(given, TrainingMean):
        side = training_mean_side(given, truth, rules, progress=progress)
        values: Mapping[str, Any] = _means(compare_sides(side, truth, places=(path, real)))
    elif path.suffix == ".h5ad":
        side = read_side(path, rules, cache=cache_folder(), progress=progress)
        values = _means(compare_sides(side, truth, places=(path, real)))
    else:
        values = _read_values(path)
    missing = [name for name in BEST if not isinstance(values.get(name), int | float)]
    if missing:
        message = f"expected numbers for {', '.join(BEST)}; {', '.join(missing)} missing"
        remedy = "give an .h5ad, the JSON of `pertcast score --json`, or cell-eval's agg_results.csv"
        raise DataError(problems=[Problem(str(path), message, remedy)])
    return {name: float(values[name]) for name in BEST}


def _read_values(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".csv":
            read = json.loads(text)
            found = read.get("overall", read) if isinstance(read, dict) else {}
            return found if isinstance(found, dict) else {}
        rows = {row.get("statistic"): row for row in csv.DictReader(text.splitlines())}
        return {ours: float(rows["mean"][theirs]) for theirs, ours in _CELL_EVAL_NAMES.items()}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the baseline's .h5ad, .json or .csv") from None
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the scores of a baseline ({error}); give an .h5ad, .json or .csv") from error


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
