"""Check the labels of a prediction: columns of obs, a label in every cell, contexts and control cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pertcast.errors import DataError, Problem
from pertcast.files.h5ad import H5adReader
from pertcast.files.labels import dubious_labels, is_control_name, is_no_label, plain
from pertcast.files.obs import near_misses
from pertcast.seasons import Season
from pertcast.submission.check.report import CheckItem, Fact, Findings, counted, named, problems_of

_COLUMN_ALIASES = ("gene", "target", "perturbation", "pert", "gene_target", "guide_target", "condition", "cell_line")


@dataclass(frozen=True)
class Groups:
    """The number of cells of each (context, label), and each cell's label."""

    cells: Mapping[tuple[str, str], int]
    num_controls: int
    label_of_row: pd.Categorical

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that have cells, sorted."""
        return tuple(sorted({label for _, label in self.cells}))

    @property
    def contexts(self) -> tuple[str, ...]:
        """The contexts that have cells, sorted."""
        return tuple(sorted({context for context, _ in self.cells}))


def control_alikes(labels: tuple[str, ...], season: Season) -> list[str]:
    """Return the labels that look like another name of the control."""
    return [label for label in labels if is_control_name(label, season.control_label)]


def check_labels(reader: H5adReader, season: Season) -> tuple[Findings, Groups | None]:
    """Check columns, empty labels, controls and contexts; return the groups unless the column is missing."""
    columns = [season.pert_column] + ([season.context_column] if season.context_column else [])
    problems: list[Problem] = []
    read: dict[str, pd.Categorical] = {}
    for column in columns:
        try:
            read[column] = _column(reader, column)
        except DataError as error:
            problems += problems_of(error, str(reader.path))
    for column, values in read.items():
        problems += _spelling_problems(reader, column, values, are_perts=column == season.pert_column)
    groups = None
    evidence = "the column is missing or cannot be read"
    if season.pert_column in read:
        groups = _group(read[season.pert_column], read.get(season.context_column or ""), season)
        control_problems, evidence = _controls(reader, season, groups)
        problems += control_problems
        if season.context_column in read:
            problems += _context_problems(reader, season, groups)
            evidence += f"; contexts {', '.join(groups.contexts)}"
    wanted = "with" if season.controls == "required" else "without"
    names = " and ".join(f"`{column}`" for column in columns)
    item = CheckItem(f"{names} {wanted} `{season.control_label}`", ok=not problems, evidence=evidence)
    facts: dict[str, Fact] = {} if groups is None else {"controls": groups.num_controls}
    if groups is not None and season.context_column in read:
        facts["contexts"] = groups.contexts
    return Findings(tuple(problems), (item,), facts), groups


def _column(reader: H5adReader, column: str) -> pd.Categorical:
    if column in reader.obs_columns:
        return reader.obs(column)
    near = near_misses(column, reader.obs_columns, num=1)
    near += [name for name in reader.obs_columns if plain(name) in {plain(alias) for alias in _COLUMN_ALIASES}]
    remedy = f"did you mean {near[0]!r}? Rename it to {column!r}" if near else f"add the column {column!r}"
    there = ", ".join(map(repr, reader.obs_columns)) or "no columns"
    raise DataError(problems=[Problem(f"{reader.path}, obs", f"expected a column {column!r}, got {there}", remedy)])


def _spelling_problems(reader: H5adReader, column: str, values: pd.Categorical, *, are_perts: bool) -> list[Problem]:
    blank = np.array([is_no_label(str(name)) for name in values.categories], dtype=bool)
    rows = np.flatnonzero((values.codes < 0) | np.isin(values.codes, np.flatnonzero(blank)))
    problems = []
    if len(rows):
        message = f"no label in {counted(len(rows), 'cell')}"
        problems.append(Problem(f"{reader.path}, obs[{column!r}], row {rows[0]}", message, "label every cell"))
    counts = {str(label): int(number) for label, number in values.value_counts().items() if number}
    dubious = [
        item for item in dubious_labels(counts, control=None, are_perts=are_perts) if not is_no_label(item.label)
    ]
    spaced = [item.label for item in dubious if item.label != item.label.strip()]
    if spaced:
        message = f"labels have spaces around them: {named(spaced)}"
        problems.append(Problem(f"{reader.path}, obs[{column!r}]", message, "strip the labels"))
    problems += [
        Problem(
            f"{reader.path}, obs[{column!r}]",
            f"{item.label!r}: {item.why}",
            f"rename it to {item.meant!r}" if item.meant else "rename it",
        )
        for item in dubious
        if item.label not in spaced
    ]
    return problems


def _group(perts: pd.Categorical, contexts: pd.Categorical | None, season: Season) -> Groups:
    """Count the cells of each pair of labels; cells without a label are another rule's."""
    context_codes = np.zeros(len(perts), dtype=np.int64) if contexts is None else np.asarray(contexts.codes, np.int64)
    context_names = [""] if contexts is None else [str(name) for name in contexts.categories]
    pert_codes = np.asarray(perts.codes, dtype=np.int64)
    labelled = (pert_codes >= 0) & (context_codes >= 0)
    width = max(len(perts.categories), 1)
    pairs, numbers = np.unique(context_codes[labelled] * width + pert_codes[labelled], return_counts=True)
    cells = {
        (context_names[int(pair) // width], str(perts.categories[int(pair) % width])): int(number)
        for pair, number in zip(pairs, numbers, strict=True)
    }
    num_controls = sum(number for (_, label), number in cells.items() if label == season.control_label)
    return Groups(cells, num_controls, perts)


def _controls(reader: H5adReader, season: Season, groups: Groups) -> tuple[list[Problem], str]:
    place = f"{reader.path}, obs[{season.pert_column!r}]"
    alike = control_alikes(groups.labels, season)
    evidence = counted(groups.num_controls, f"{season.control_label!r} cell")
    if season.controls == "forbidden":
        found = [season.control_label] * (groups.num_controls > 0) + alike
        if not found:
            return [], evidence
        message = f"season {season.name} takes no control cells, got {named(found)}"
        return [Problem(place, message, "remove these cells")], f"control cells labelled {named(found)}"
    if groups.num_controls == 0:
        near = alike or near_misses(season.control_label, groups.labels, num=1)
        remedy = (
            f"did you mean {near[0]!r}? Rename it to {season.control_label!r}"
            if near
            else "add control cells; `pertcast assemble` puts them in"
        )
        seen = f"; there is {named(near)}" if near else ""
        message = f"expected at least one cell labelled {season.control_label!r}, got none{seen}"
        return [Problem(place, message, remedy)], f"no {season.control_label!r} cell{seen}"
    if alike:
        message = f"control cells under more than one label: {named([season.control_label, *alike])}"
        return [Problem(place, message, f"rename them all to {season.control_label!r}")], message
    return [], evidence


def _context_problems(reader: H5adReader, season: Season, groups: Groups) -> list[Problem]:
    allowed = season.contexts or ()
    if any(set(group) == set(groups.contexts) for group in allowed):
        return []
    wanted = " or ".join("{" + ", ".join(group) + "}" for group in allowed)
    message = f"expected the contexts {wanted}, never mixed, got {named(groups.contexts)}"
    remedy = "label every cell with a context of one set, all of the set's contexts present"
    return [Problem(f"{reader.path}, obs[{season.context_column!r}]", message, remedy)]
