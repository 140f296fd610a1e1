"""Reads what an experiment names: the files of its datasets and, from their obs, what every cell is.

Invariants: no column, label or context is guessed; nothing of X is read here; every problem of all files is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pertcast.config import Experiment
from pertcast.data.split import CellKeys, Split, assign_split
from pertcast.errors import ConfigError, DataError, Problem
from pertcast.files.h5ad import H5adReader, open_h5ad

__all__ = ["CellTable", "Split", "assign_split", "dataset_files", "experiment_files", "read_cells"]

_SUFFIXES = (".h5", ".h5ad")


def _expand_braces(pattern: str) -> list[str]:
    """Return the patterns that ``{a,b}`` stands for.

    >>> _expand_braces("x/{a,b}*.h5")
    ['x/a*.h5', 'x/b*.h5']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [item for choice in found[1].split(",") for item in _expand_braces(f"{before}{choice}{after}")]


def _matches(pattern: str) -> Iterator[Path]:
    start = Path(Path(pattern).anchor)
    return start.glob(str(Path(pattern).relative_to(start)))


def dataset_files(name: str, pattern: str) -> list[Path]:
    """Return the files of a dataset, sorted: a folder's .h5 and .h5ad files, one file, or what a pattern matches.

    Parameters
    ----------
    name
        The dataset, for messages.
    pattern
        A folder, a file, or a pattern with ``*``, ``?``, ``[...]``, ``**`` and ``{a,b}``.

    Raises
    ------
    DataError
        If nothing matches.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [item for item in path.iterdir() if item.suffix in _SUFFIXES]
    else:
        matches = [item for part in _expand_braces(pattern) for item in _matches(part)]
        found = [item for item in matches if item.is_file() and item.suffix in _SUFFIXES]
    if not found:
        what = "no .h5 or .h5ad file in this folder" if path.is_dir() else "no .h5 or .h5ad file is or matches this"
        remedy = "give a folder, a file or a pattern (relative to the experiment file)"
        raise DataError(problems=[Problem(f'[datasets] {name} = "{pattern}"', what, remedy)])
    return sorted(set(found))


def experiment_files(experiment: Experiment) -> list[tuple[str, Path]]:
    """Return ``(dataset, file)`` of all datasets, in the order of the experiment file.

    Raises
    ------
    DataError
        If a dataset has no file, or two datasets share one.
    """
    files: list[tuple[str, Path]] = []
    problems: list[Problem] = []
    owner: dict[Path, str] = {}
    for name, pattern in experiment.datasets.items():
        try:
            paths = dataset_files(name, pattern)
        except DataError as error:
            problems += error.problems
            continue
        for path in paths:
            if path.resolve() in owner:
                other = owner[path.resolve()]
                problems.append(
                    Problem(str(path), f"stands in dataset {other} and in {name}", "give each file to one dataset")
                )
            owner[path.resolve()] = name
            files.append((name, path))
    if problems:
        raise DataError(problems=problems)
    return files


@dataclass(frozen=True, eq=False)
class CellTable:
    """What every cell of an experiment is; cells are in the order of the files.

    Attributes
    ----------
    files
        ``(dataset, path, number of cells)`` of each file.
    genes_of_file
        The genes of each file.
    keys
        Dataset, context, perturbation and name of each cell.
    batches, batch_codes
        Batches, and the position of each cell's in them, int32 (num_cells,); -1 where it is unknown.
    notes
        What a user should know.
    """

    files: tuple[tuple[str, Path, int], ...]
    genes_of_file: tuple[tuple[str, ...], ...]
    keys: CellKeys
    batches: tuple[str, ...]
    batch_codes: np.ndarray
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _FileObs:
    num_cells: int
    genes: tuple[str, ...]
    names: np.ndarray
    perts: pd.Categorical
    contexts: pd.Categorical
    batches: pd.Categorical


def _read_file(experiment: Experiment, dataset: str, path: Path, *, several_datasets: bool) -> _FileObs:
    columns = experiment.columns.in_dataset(dataset)
    with open_h5ad(path, layer=columns.layer) as reader:
        problems: list[Problem] = []
        if not reader.num_cells or not reader.num_genes:
            message = f"expected cells x genes, got {reader.num_cells} x {reader.num_genes}"
            problems.append(Problem(f"{path}, X", message, "leave this file out, or give one with cells"))
        if columns.cell_type is None and columns.context is None:
            remedy = 'set columns.cell_type = "..." to its column, or columns.context = "H1" if there is one cell type'
            place = f"{path}, obs ({', '.join(reader.obs_columns)})"
            problems.append(Problem(place, "nothing says of which cell type a cell is", remedy))
        perts = _column(reader, columns.pert, problems, required=True)
        perts = _renamed(perts, columns.control, experiment.columns.control)
        contexts = _constant(reader, columns.context or "")
        if columns.cell_type is not None:
            contexts = _column(reader, columns.cell_type, problems, required=True)
        batches = _constant(reader, None)
        if columns.batch is not None:
            batches = _column(reader, columns.batch, problems, required=False)
            if several_datasets:
                batches = batches.rename_categories(lambda label: f"{dataset}.{label}")
        if problems:
            raise DataError(problems=problems)
        return _FileObs(reader.num_cells, reader.genes, reader.obs_names(), perts, contexts, batches)


def _renamed(perts: pd.Categorical, label: str, wanted: str) -> pd.Categorical:
    """Return the labels with one renamed."""
    if label == wanted or label not in perts.categories:
        return perts
    names = np.array([*(wanted if name == label else name for name in perts.categories), None], dtype=object)
    return pd.Categorical(names[perts.codes])


def _constant(reader: H5adReader, label: str | None) -> pd.Categorical:
    code = -1 if label is None else 0
    return pd.Categorical.from_codes(
        np.full(reader.num_cells, code, dtype=np.int32),
        categories=pd.Index([] if label is None else [label], dtype=object),
    )


def _column(reader: H5adReader, column: str, problems: list[Problem], *, required: bool) -> pd.Categorical:
    try:
        values = reader.obs(column)
    except DataError as error:
        problems += error.problems
        return _constant(reader, None)
    empty = np.flatnonzero(values.codes < 0)
    if required and len(empty):
        problems.append(
            Problem(
                f"{reader.path}, obs[{column!r}]",
                f"{len(empty):,} cells have no value, the first is row {empty[0]}",
                "fill it in or drop these cells",
            )
        )
    return values


def read_cells(experiment: Experiment) -> CellTable:
    """Read what every cell is from the obs of all files.

    Raises
    ------
    ConfigError
        If `columns` names a cell-type column and one context.
    DataError
        With every problem of every file: not AnnData, a column that is missing or has gaps.
    """
    columns = experiment.columns
    problems = [
        Problem(place, "cell_type and context are both given", "keep cell_type where there is a column")
        for place, cell_type, context in (
            ("[columns]", columns.cell_type, columns.context),
            *((f"[columns.of.{name}]", of.cell_type, of.context) for name, of in columns.of.items()),
        )
        if cell_type is not None and context is not None
    ]
    if problems:
        raise ConfigError(problems=problems)
    files = experiment_files(experiment)
    several = len(experiment.datasets) > 1
    parts: list[_FileObs] = []
    for dataset, path in files:
        try:
            parts.append(_read_file(experiment, dataset, path, several_datasets=several))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError("the data cannot be read" if len(problems) > 1 else "", problems=problems)
    perts, pert_codes = _joined([part.perts for part in parts])
    contexts, context_codes = _joined([part.contexts for part in parts])
    batches, batch_codes = _joined([part.batches for part in parts])
    sizes = [part.num_cells for part in parts]
    dataset_position = {name: code for code, name in enumerate(experiment.datasets)}
    keys = CellKeys(
        datasets=tuple(experiment.datasets),
        contexts=contexts,
        perts=perts,
        files=tuple(path.name for _, path in files),
        dataset_codes=np.repeat([dataset_position[name] for name, _ in files], sizes).astype(np.int32),
        context_codes=context_codes,
        pert_codes=pert_codes,
        file_codes=np.repeat(np.arange(len(files)), sizes).astype(np.int32),
        names=np.concatenate([part.names for part in parts]),
    )
    unknown = int((batch_codes < 0).sum())
    notes = (
        [f"{unknown:,} cells have no value in {columns.batch!r}: their batch is unknown"]
        if unknown and columns.batch
        else []
    )
    listed = tuple((dataset, path, size) for (dataset, path), size in zip(files, sizes, strict=True))
    return CellTable(listed, tuple(part.genes for part in parts), keys, batches, batch_codes, tuple(notes))


def _joined(parts: Sequence[pd.Categorical]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the sorted labels that any cell has, and the codes of all cells, int32."""
    used = [part.remove_unused_categories() for part in parts]
    labels = sorted({str(label) for part in used for label in part.categories})
    position = {label: code for code, label in enumerate(labels)}
    codes = []
    for part in used:
        lookup = np.array([*(position[str(label)] for label in part.categories), -1], dtype=np.int32)
        codes.append(lookup[part.codes])
    return tuple(labels), np.concatenate(codes)
