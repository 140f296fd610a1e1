"""What will be made, before anything is made: contexts, targets, cells under the cap, control cells.

The plan is shown to the user and stored beside the parts; every part is a function of its line in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from pertcast.config import Experiment
from pertcast.data.store import Split, Store
from pertcast.errors import ConfigError, DataError, Problem
from pertcast.files.season_lists import read_targets
from pertcast.seasons import Season
from pertcast.submission.budget import Budget, plan_budget, room_for_controls
from pertcast.submission.bundle import contexts_in_force

__all__ = ["Part", "Plan", "control_rows", "plan_parts", "submission_dataset"]

_USED = Split.TRAIN | Split.VAL | Split.TEST


@dataclass(frozen=True)
class Part:
    """One file of the parts: all cells of one target in one context.

    Attributes
    ----------
    file
        Path relative to the parts' folder.
    context, target
        The labels; the target of control cells is the season's control label.
    dataset
        The dataset whose control cells it is made from.
    num_cells
        Cells in it.
    copied
        Whether they are control cells copied from training, and not predicted.
    median_umi
        Median total of counts that its cells should have, ``None`` where the list does not say.
    """

    file: str
    dataset: str
    context: str
    target: str
    num_cells: int
    copied: bool = False
    median_umi: float | None = None


@dataclass(frozen=True)
class Plan:
    """What will be made, in the order of the prediction."""

    season: Season
    budget: Budget
    contexts: tuple[str, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def _split_of(experiment: Experiment) -> Split:
    return Split.TRAIN if experiment.generate.controls_from == "train" else _USED


def _contexts(store: Store, experiment: Experiment, season: Season) -> tuple[str, ...]:
    """Return the contexts to predict, by the season's rules."""
    there = ", ".join(repr(name) for name in store.contexts)
    if season.contexts is not None:
        for group in season.contexts:
            if set(group) <= set(store.contexts):
                return group
        wanted = " or ".join(", ".join(group) for group in season.contexts)
        raise DataError(
            f"{store.path}: season {season.name} wants control cells of the contexts {wanted}; the store has {there}; "
            "add the season's control cells to [datasets] and [training], with the name of their column of contexts in "
            "columns.cell_type (or in [columns.of.DATASET] cell_type)"
        )
    if experiment.submission.context is not None:
        if experiment.submission.context not in store.contexts:
            raise ConfigError(
                f"[submission] context: no control cells of {experiment.submission.context!r}; the store has {there}; "
                "name one of these"
            )
        return (experiment.submission.context,)
    if len(store.contexts) > 1:
        raise ConfigError(
            f"[submission] context: season {season.name} has one context and the store has {len(store.contexts)} "
            f"({there}); name one with --set submission.context=..."
        )
    return (store.contexts[0],)


def submission_dataset(datasets: Collection[str], context: str, experiment: Experiment) -> str:
    """Return the dataset whose control cells a context is predicted from.

    Parameters
    ----------
    datasets
        Those that have control cells of the context.
    context
        The context to predict.
    experiment
        Its ``submission.dataset`` decides between several.

    Raises
    ------
    ConfigError
        If there are several and none is named, or the one that is named has no such cells.
    """
    asked = experiment.submission.dataset
    if asked is None and len(datasets) == 1:
        return next(iter(datasets))
    if asked in datasets:
        return str(asked)
    there = ", ".join(map(repr, sorted(datasets)))
    if asked is None:
        message = f"{len(datasets)} datasets have control cells of {context!r}: {there}"
        remedy = f"name the one to predict, for example --set submission.dataset={sorted(datasets)[0]}"
    else:
        message = f"{asked!r} has no control cells of {context!r}; they are in {there or 'no dataset'}"
        remedy = "name one of these"
    raise ConfigError(problems=[Problem("[submission] dataset", message, remedy)])


def control_rows(store: Store, experiment: Experiment, dataset: str, context: str) -> NDArray[np.int64]:
    """Return the rows of the control cells of a dataset and context that cells may be made from.

    Raises
    ------
    DataError
        If there are none in the splits that ``generate.controls_from`` names.
    """
    codes = {"dataset": store.datasets.index(dataset), "context": store.contexts.index(context)}
    rows = store.rows(split=_split_of(experiment), pert=store.control_code, **codes)
    if not len(rows):
        raise DataError(
            f"{store.path}: no control cells of {dataset}.{context} in the splits of "
            f"generate.controls_from = {experiment.generate.controls_from!r}; "
            'pass --set generate.controls_from="all"'
        )
    return rows


def _dataset_of(store: Store, experiment: Experiment, context: str) -> str:
    used = store.rows(split=_USED, context=store.contexts.index(context), pert=store.control_code)
    datasets = [store.datasets[code] for code in np.unique(store.dataset_codes[used])]
    return submission_dataset(datasets, context, experiment)


def _num_controls(store: Store, experiment: Experiment, season: Season, part: Part) -> tuple[int, list[str]]:
    """Return how many control cells go into the prediction, and what the user should know about the number."""
    submission = experiment.submission
    if season.controls == "forbidden":
        return 0, []
    wanted = room_for_controls(season.max_cells, num_controls=submission.num_controls, share=submission.control_share)
    if wanted == 0:
        raise ConfigError("[submission] num_controls: the season wants at least one control cell; ask for some")
    there = len(control_rows(store, experiment, part.dataset, part.context))
    if submission.controls == "predicted" or there >= wanted:
        return wanted, []
    if submission.num_controls is not None:
        raise ConfigError(
            f"[submission] num_controls: {wanted:,} control cells asked for, {there:,} are there to copy; "
            f'ask for at most {there:,}, or predict them with --set submission.controls="predicted"'
        )
    return there, [f"room for {wanted:,} control cells; all {there:,} that training has are copied"]


def _check_scale(store: Store, experiment: Experiment, season: Season) -> None:
    scale = experiment.generate.scale
    if scale not in season.scales:
        raise ConfigError(
            f"[generate] scale: season {season.name} takes {' or '.join(season.scales)}, got {scale!r}; "
            f"pass --set generate.scale={season.scales[0]}"
        )
    if store.scale != "counts" and experiment.generate.reads_counts:
        raise ConfigError(
            f"[generate] scale = {scale!r}, cells = {experiment.generate.cells!r}: they need control cells in counts, "
            f"and {store.path} was made of log1p values; prepare it from raw counts, or choose others"
        )


def plan_parts(store: Store, experiment: Experiment) -> Plan:
    """Return the plan: which cells of which target in which context, under the season's cap.

    Raises
    ------
    ConfigError, DataError, SubmissionError
        If targets, contexts, controls or the cap do not fit one another; the message says what would.
    """
    submission = experiment.submission
    season, bundle_notes = contexts_in_force(submission.resolve(), submission.targets, submission.genes)
    if submission.targets is None:
        raise ConfigError("[submission] targets: no target list is given; pass --targets pert_counts.csv")
    _check_scale(store, experiment, season)
    if len(store.genes) != season.num_genes:
        raise DataError(
            f"{store.path}: season {season.name} wants {season.num_genes:,} genes, the store has {len(store.genes):,}; "
            "prepare it with the season's list (submission.genes), or pass "
            f"--set submission.rules.num_genes={len(store.genes)}"
        )
    targets = read_targets(submission.targets, season)
    contexts = _contexts(store, experiment, season)
    notes = [*season.describe_overrides(), *bundle_notes, *targets.notes]
    datasets = {context: _dataset_of(store, experiment, context) for context in contexts}
    label = season.control_label
    controls = Part(
        _file(contexts[0], label), datasets[contexts[0]], contexts[0], label, 0, submission.controls == "copied"
    )
    num_controls, more = _num_controls(store, experiment, season, controls)
    notes += more
    requested = {(context, target): number for context in contexts for target, number in targets.requested().items()}
    names = {key: key[1] if len(contexts) == 1 else f"{key[0]}/{key[1]}" for key in requested}
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
    return Plan(season, budget, contexts, tuple(parts), (*notes, *budget.notes))


def _file(context: str, target: str) -> str:
    return f"{quote(context, safe=' +-_.')}/{quote(target, safe=' +-_.')}.h5ad"
