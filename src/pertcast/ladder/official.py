"""The metrics of season 2026, as its official scorer cell-eval2 computes them (extra ``pertcast[score]``)."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from pertcast.errors import ConfigError, DataError
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season

__all__ = ["score_by_cell_eval2"]


def score_by_cell_eval2(
    predicted: Path, real: Path, *, rules: Season, progress: Progress = SILENT
) -> tuple[dict[str, float], dict[str, dict[str, float]], list[str]]:
    """Return metric → mean, target → metric → value, and notes; each context is scored by itself.

    With several contexts a target is named ``context/target``, and means are means of the contexts' own aggregates: of
    those that have the metric. The control cells are those of the real file. The third value names missing metrics.

    Raises
    ------
    ConfigError
        If cell-eval2 is not installed.
    DataError
        If a file is missing, the contexts of the two files differ, or cell-eval2 refuses them.
    """
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
            ours, theirs = (_cells_of(side, rules.context_column, context) for side in sides)
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
    """Return the contexts that both files have; one nameless context where neither says any."""
    found = [set(side.obs[column].astype(str)) if column in side.obs else set() for side in sides]
    if found[0] != found[1]:
        ours, theirs = (", ".join(sorted(names)) or "none" for names in found)
        raise DataError(
            f"{places[0]}: expected contexts {theirs} (of {places[1]}), got {ours}; score files of the same"
        )
    return sorted(found[0]) or [""]


def _cells_of(side: Any, column: str | None, context: str) -> Any:
    return side[(side.obs[column].astype(str) == context).to_numpy()].copy() if context else side
