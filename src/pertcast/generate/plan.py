"""Plan a generation: contexts, targets, cells under the cap, control cells.

The plan is shown to the user and stored beside the parts. Every part depends only on its line of the plan.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from pertcast.config import Experiment
from pertcast.data.split import CodedCells, Split
from pertcast.errors import ConfigError, DataError, Problem, Problems
from pertcast.files.labels import file_name
from pertcast.files.season_lists import read_targets
from pertcast.seasons import Season
from pertcast.submission.cell_budget import Budget, plan_budget, room_for_controls
from pertcast.submission.season_bundle import contexts_in_force

_USED = Split.TRAIN | Split.VAL | Split.TEST


@dataclass(frozen=True)
class Part:
    """One part file: all cells of one target in one context."""

    file: str  # Path relative to the parts' folder
    dataset: str  # The dataset whose control cells it is made from
    context: str  # The labels; the target of control cells is the season's control label
    target: str
    num_cells: int  # Cells in it
    copied: bool = False  # Whether they are control cells copied from training, and not predicted
    # Median total of counts that its cells should have, ``None`` if the list does not say
    median_umi: float | None = None


@dataclass(frozen=True)
class Plan:
    """All parts, in the order of the prediction."""

    season: Season
    budget: Budget
    contexts: tuple[str, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def prediction_sources(cells: CodedCells, experiment: Experiment, season: Season) -> dict[str, str]:
    """Return the contexts to predict, and the dataset whose control cells each uses."""
    there = ", ".join(repr(name) for name in cells.contexts)
    asked = experiment.submission.context
    if season.contexts is not None:
        contexts = next((group for group in season.contexts if set(group) <= set(cells.contexts)), None)
        if contexts is None:
            wanted = " or ".join(", ".join(group) for group in season.contexts)
            raise DataError(
                f"{cells.path}: season {season.name} wants control cells of the contexts {wanted}; there are {there}; "
                "add the season's control cells to [datasets] and [training], with the name of their column of "
                "contexts in columns.cell_type (or in [columns.of.DATASET] cell_type)"
            )
    elif asked is None and len(cells.contexts) > 1:
        raise ConfigError(
            f"[submission] context: season {season.name} has one context and the data have {len(cells.contexts)} "
            f"({there}); name one with --set submission.context=..."
        )
    elif asked is not None and asked not in cells.contexts:
        raise ConfigError(
            f"[submission] context: no control cells of {asked!r}; the data have {there}; name one of these"
        )
    else:
        contexts = (cells.contexts[0] if asked is None else asked,)
    return {context: _dataset_of(cells, experiment, context) for context in contexts}


def _dataset_of(cells: CodedCells, experiment: Experiment, context: str) -> str:
    used = cells.rows(split=_USED, context=cells.contexts.index(context), pert=cells.control_code)
    datasets = sorted(cells.datasets[code] for code in np.unique(cells.dataset_codes[used]))
    asked = experiment.submission.dataset
    there = ", ".join(map(repr, datasets)) or "no dataset"
    if asked in datasets:
        return str(asked)
    if asked is not None:
        message, remedy = f"{asked!r} has no control cells of {context!r}; {there} has", "name one that has"
    elif len(datasets) == 1:
        return str(datasets[0])
    elif not datasets:
        message = f"no dataset of [training], [zeroshot] or [fewshot] has control cells of {context!r}"
        remedy = "add one that has"
    else:
        message = f"{len(datasets)} datasets have control cells of {context!r}: {there}"
        remedy = f"name the one to predict, for example --set submission.dataset={datasets[0]}"
    raise ConfigError(problems=[Problem("[submission] dataset", message, remedy)])


def control_rows(cells: CodedCells, experiment: Experiment, dataset: str, context: str) -> NDArray[np.int64]:
    """Return the rows of control cells of a dataset and context that may be used."""
    codes = {"dataset": cells.datasets.index(dataset), "context": cells.contexts.index(context)}
    rows: NDArray[np.int64] = cells.rows(
        split=Split.TRAIN if experiment.generate.controls_from == "train" else _USED, pert=cells.control_code, **codes
    )
    if not len(rows):
        raise DataError(
            f"{cells.path}: no control cells of {dataset}.{context} in the splits of "
            f"generate.controls_from = {experiment.generate.controls_from!r}; "
            'pass --set generate.controls_from="all"'
        )
    return rows


def _num_controls(cells: CodedCells, experiment: Experiment, season: Season, part: Part) -> tuple[int, list[str]]:
    """Return the number of control cells in the prediction, and a note on it."""
    submission = experiment.submission
    if season.controls == "forbidden":
        return 0, []
    wanted = room_for_controls(season.max_cells, num_controls=submission.num_controls, share=submission.control_share)
    if wanted == 0:
        raise ConfigError("[submission] num_controls: the season wants at least one control cell; ask for some")
    there = len(control_rows(cells, experiment, part.dataset, part.context))
    if submission.controls == "predicted" or there >= wanted:
        return wanted, []
    if submission.num_controls is not None:
        raise ConfigError(
            f"[submission] num_controls: {wanted:,} control cells asked for, {there:,} are available to copy; "
            f'ask for at most {there:,}, or predict them with --set submission.controls="predicted"'
        )
    return there, [f"room for {wanted:,} control cells; all {there:,} that training has are copied"]


def _check_genes(cells: CodedCells, season: Season) -> None:
    if len(cells.genes) != season.num_genes:
        raise DataError(
            f"{cells.path}: season {season.name} wants {season.num_genes:,} genes, got {len(cells.genes):,}; "
            "use the season's list (submission.genes), or pass "
            f"--set submission.rules.num_genes={len(cells.genes)}"
        )


def plan_parts(cells: CodedCells, experiment: Experiment) -> Plan:
    """Return the plan: the cells of each target in each context, under the season's cap."""
    submission = experiment.submission
    if submission.targets is None:
        raise ConfigError("[submission] targets: no target list is given; pass --targets pert_counts.csv")
    season, bundle_notes = contexts_in_force(submission.resolve(), submission.targets, submission.genes)
    problems = Problems()
    with problems.collect():
        scale = experiment.generate.scale
        if scale not in season.scales:
            raise ConfigError(
                f"[generate] scale: season {season.name} takes {' or '.join(season.scales)}, got {scale!r}; "
                f"pass --set generate.scale={season.scales[0]}"
            )
        if cells.known_scale == "log1p" and experiment.generate.reads_counts:
            raise ConfigError(
                f"[generate] scale = {scale!r}, cells = {experiment.generate.cells!r}: they need control cells in "
                f"counts, and {cells.path} has log1p values; prepare it from raw counts, or choose others"
            )
    with problems.collect():
        _check_genes(cells, season)
    with problems.collect():
        targets = read_targets(submission.targets, season)
    with problems.collect():
        datasets = prediction_sources(cells, experiment, season)
        context, dataset = next(iter(datasets.items()))
        label = season.control_label
        controls = Part(_file(context, label), dataset, context, label, 0, submission.controls == "copied")
        num_controls, control_notes = _num_controls(cells, experiment, season, controls)
    problems.raise_if_any()
    requested = {(context, target): number for context in datasets for target, number in targets.requested().items()}
    names = {key: key[1] if len(datasets) == 1 else f"{key[0]}/{key[1]}" for key in requested}
    budget = plan_budget(
        {names[key]: number for key, number in requested.items()}, cap=season.max_cells, num_controls=num_controls
    )
    umis = dict(zip(targets.targets, targets.median_umi, strict=True)) if targets.median_umi else {}
    parts = [
        Part(_file(*key), datasets[key[0]], *key, budget.cells[names[key]], median_umi=umis.get(key[1]))
        for key in requested
    ]
    if num_controls:
        parts.append(dataclasses.replace(controls, num_cells=num_controls))
    notes = (*season.describe_overrides(), *bundle_notes, *targets.notes, *control_notes, *budget.notes)
    return Plan(season, budget, tuple(datasets), tuple(parts), notes)


def _file(context: str, target: str) -> str:
    return f"{quote(context, safe=' +-_.')}/{file_name(target)}"
