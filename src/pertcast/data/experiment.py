"""Read the files and obs tables that an experiment names.

Invariants: no column, label or context is guessed. X is not read here. All problems of all files are reported.
"""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pertcast.config import Experiment
from pertcast.data.split import CellKeys
from pertcast.errors import ConfigError, DataError, Problem
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.files.labels import dubious_labels, is_no_label
from pertcast.files.obs import near_misses

_SUFFIXES = (".h5", ".h5ad")


def expand_braces(pattern: str) -> list[str]:
    """Return the patterns of ``{a, b}``; spaces around an alternative are ignored."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [item for choice in found[1].split(",") for item in expand_braces(f"{before}{choice.strip()}{after}")]


def _files_of(pattern: str) -> list[Path]:
    """Return the .h5 and .h5ad files of one pattern without braces."""
    path = Path(pattern)
    matches = [path] if path.exists() else [Path(name) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207 (a pattern may be absolute)
    inside = [item for folder in matches if folder.is_dir() for item in folder.iterdir()]
    own = [item for item in matches if item.is_file()]
    chosen = own if path.suffix.lower() in _SUFFIXES else inside if any(map(_is_data, inside)) else own
    return sorted({item for item in chosen if _is_data(item)})


def _is_data(path: Path) -> bool:
    # ._ files of macOS are not data
    return path.is_file() and path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def dataset_files(name: str, pattern: str) -> list[Path]:
    """Return the files of a dataset, sorted: those of a folder, one file, or the matches of a pattern."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    found: set[Path] = set()
    problems = []
    for part in [pattern] if Path(pattern).is_dir() else expand_braces(pattern):
        files = _files_of(part)
        found.update(files)
        if not files:
            what = (
                "no .h5 or .h5ad file is in this folder" if Path(part).is_dir() else "no .h5 or .h5ad file matches this"
            )
            where = "" if part == pattern else f", which has {part}"
            remedy = "give a folder, a file or a pattern, relative to the experiment file or to the working folder"
            problems.append(Problem(f'[datasets] {name} = "{pattern}"{where}', what, remedy))
    if problems:
        raise DataError(problems=problems)
    return sorted(found)


def experiment_files(experiment: Experiment) -> list[tuple[str, Path]]:
    """Return ``(dataset, file)`` of all datasets, in the order of the experiment file."""
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
                message = (
                    f"is in dataset {other} and in {name}" if other != name else "is in the dataset twice, by a link"
                )
                problems.append(Problem(str(path), message, "list each file once"))
            owner[path.resolve()] = name
            files.append((name, path))
    if problems:
        raise DataError(problems=problems)
    return files


@dataclass(frozen=True, eq=False)
class CellTable:
    """What every cell of an experiment is; cells follow the order of the files."""

    files: tuple[tuple[str, Path, int], ...]  # ``(dataset, path, number of cells)`` of each file
    genes_of_file: tuple[tuple[str, ...], ...]  # The genes of each file
    keys: CellKeys  # Dataset, context, perturbation and name of each cell
    # Batches, what each is called in its own file, and each cell's position in them, int32 (num_cells,); -1
    # where it is unknown. Batches of two files are two batches, whatever they are called
    batches: tuple[str, ...]
    batch_labels: tuple[str, ...]
    batch_codes: np.ndarray
    notes: tuple[str, ...]  # What a user should know


@dataclass(frozen=True, eq=False)
class _FileObs:
    num_cells: int
    genes: tuple[str, ...]
    names: np.ndarray
    perts: pd.Categorical
    contexts: pd.Categorical
    batches: pd.Categorical
    labels: frozenset[str]  # As in the file, before they are renamed
    missing: tuple[Problem, ...]  # Cells without a value


def _file_names(files: Sequence[tuple[str, Path]]) -> list[str]:
    """Return a unique name for each file: its own, with as much of its path as that needs."""
    names = [path.name for _, path in files]
    return [
        name
        if names.count(name) == 1
        else f"{path.parent.name}/{name}"
        if len({other.parent.name for _, other in files if other.name == name}) == names.count(name)
        else str(path)
        for (_, path), name in zip(files, names, strict=True)
    ]


def _read_file(experiment: Experiment, dataset: str, path: Path) -> _FileObs:
    columns = experiment.columns.in_dataset(dataset)
    with open_h5ad(path, layer=columns.layer) as reader:
        problems: list[Problem] = []
        missing: list[Problem] = []
        if not reader.num_cells or not reader.num_genes:
            message = f"expected cells x genes, got {reader.num_cells} x {reader.num_genes}"
            problems.append(Problem(f"{path}, X", message, "leave this file out, or give one with cells"))
        if columns.cell_type is None and columns.context is None:
            remedy = 'set columns.cell_type = "..." to its column, or columns.context = "H1" if there is one cell type'
            place = f"{path}, obs ({', '.join(reader.obs_columns)})"
            problems.append(Problem(place, "no column gives the cell type", remedy))
        perts = _column(reader, columns.pert, problems, missing)
        labels = frozenset(map(str, perts.categories))
        perts = _renamed(perts, {columns.control: experiment.columns.control} | columns.rename)
        contexts = _constant(reader, columns.context or "")
        if columns.cell_type is not None:
            contexts = _column(reader, columns.cell_type, problems, missing)
        batches = _constant(reader, None)
        if columns.batch is not None:
            # a batch that is not named is unknown
            batches = _column(reader, columns.batch, problems, [])
            batches = batches.remove_categories([label for label in batches.categories if is_no_label(label)])
        if problems:
            raise DataError(problems=problems)
        return _FileObs(
            reader.num_cells, reader.genes, reader.obs_names(), perts, contexts, batches, labels, tuple(missing)
        )


def _renamed(perts: pd.Categorical, names: Mapping[str, str]) -> pd.Categorical:
    """Rename labels; two labels with the same new name become one."""
    if all(names.get(label, label) == label for label in perts.categories):
        return perts
    renamed = np.array([*(names.get(label, label) for label in perts.categories), None], dtype=object)
    return pd.Categorical(renamed[perts.codes])


def _constant(reader: H5adReader, label: str | None) -> pd.Categorical:
    code = -1 if label is None else 0
    return pd.Categorical.from_codes(
        np.full(reader.num_cells, code, dtype=np.int32),
        categories=pd.Index([] if label is None else [label], dtype=object),
    )


def _column(reader: H5adReader, column: str, problems: list[Problem], missing: list[Problem]) -> pd.Categorical:
    try:
        values = reader.obs(column)
    except DataError as error:
        problems += error.problems
        return _constant(reader, None)
    values = pd.Categorical(values.astype(object).astype(str)) if values.categories.dtype != object else values
    empty = np.flatnonzero(values.codes < 0)
    if len(empty):
        missing.append(
            Problem(
                f"{reader.path}, obs[{column!r}]",
                f"{len(empty):,} cells have no value, the first is row {empty[0]}",
                "fill it in or drop these cells",
            )
        )
    return values


def read_cells(experiment: Experiment) -> CellTable:
    """Read what every cell is from the obs tables of all files."""
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
    parts: list[_FileObs] = []
    for dataset, path in files:
        try:
            parts.append(_read_file(experiment, dataset, path))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError("the data cannot be read" if len(problems) > 1 else "", problems=problems)
    problems = [problem for part in parts for problem in part.missing]
    problems += [*_rename_problems(experiment, files, parts), *_label_problems(experiment, files, parts)]
    if problems:
        raise DataError("labels that are likely mistakes", problems=problems)
    perts, pert_codes = _joined([part.perts for part in parts])
    contexts, context_codes = _joined([part.contexts for part in parts])
    batches, batch_labels, batch_codes = _joined_batches([part.batches for part in parts], files)
    sizes = [part.num_cells for part in parts]
    dataset_position = {name: code for code, name in enumerate(experiment.datasets)}
    keys = CellKeys(
        datasets=tuple(experiment.datasets),
        contexts=contexts,
        perts=perts,
        files=tuple(_file_names(files)),
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
    genes_of_file = tuple(part.genes for part in parts)
    return CellTable(listed, genes_of_file, keys, batches, batch_labels, batch_codes, tuple(notes))


def _label_problems(
    experiment: Experiment, files: Sequence[tuple[str, Path]], parts: Sequence[_FileObs]
) -> list[Problem]:
    """Return every label that is likely a mistake, with its remedy."""
    problems = []
    # a label that a dataset confirms is kept in the files of that dataset alone
    confirmed = [
        {label for label, name in experiment.columns.in_dataset(dataset).rename.items() if label == name}
        for dataset, _ in files
    ]
    for what, control, columns in (
        ("perturbation", experiment.columns.control, [part.perts for part in parts]),
        ("cell type", None, [part.contexts for part in parts]),
    ):
        cells: Counter[str] = Counter()
        doubtful: Counter[str] = Counter()
        places: dict[str, list[str]] = {}
        for (_, path), column, sure in zip(files, columns, confirmed, strict=True):
            for label, number in column.value_counts().items():
                if number:
                    cells[str(label)] += int(number)
                    if str(label) not in sure:
                        doubtful[str(label)] += int(number)
                        places.setdefault(str(label), []).append(path.name)
        kept = cells.keys() - doubtful.keys()
        for label, why, meant in dubious_labels(cells, control=control, are_perts=control is not None, kept=kept):
            where = f"{what} {label!r} ({doubtful[label]:,} cells in {', '.join(places[label])})"
            quoted, wanted = (json.dumps(text, ensure_ascii=False) for text in (label, meant))
            remedy = "correct the cell types in the file"
            if control is not None and meant:
                remedy = f"add {quoted} = {wanted} to [columns.rename], or keep it with {quoted} = {quoted}"
            elif control is not None:
                remedy = 'give it another name in [columns.rename]: "..." = "..."'
            problems.append(Problem(where, why, remedy))
    return problems


def _rename_problems(
    experiment: Experiment, files: Sequence[tuple[str, Path]], parts: Sequence[_FileObs]
) -> list[Problem]:
    """Return the entries of [columns.rename] that match no label, before or after renaming."""
    problems = []
    labels_of: dict[str, set[str]] = {}
    for (dataset, _), part in zip(files, parts, strict=True):
        labels_of.setdefault(dataset, set()).update(part.labels, map(str, part.perts.categories))
    tables = [("[columns.rename]", experiment.columns.rename, set().union(*labels_of.values()))]
    for name, of in experiment.columns.of.items():
        tables.append((f"[columns.of.{name}.rename]", of.rename, labels_of.get(name, set())))
    for place, table, labels in tables:
        for label in table:
            if label not in labels:
                near = near_misses(label, sorted(labels))
                remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else "remove it"
                problems.append(Problem(f"{place} {label!r}", "no cell has this label", remedy))
    return problems


def _joined_batches(
    parts: Sequence[pd.Categorical], files: Sequence[tuple[str, Path]]
) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """Return the batches of all files, their labels in their files, and the codes of all cells, int32."""
    datasets = [dataset for dataset, _ in files]
    prefixes = [
        "" if len(files) == 1 else f"{dataset}." if datasets.count(dataset) == 1 else f"{dataset}/{name}."
        for dataset, name in zip(datasets, _file_names(files), strict=True)
    ]
    named = [
        part.rename_categories({label: f"{prefix}{label}" for label in part.categories})
        for part, prefix in zip(parts, prefixes, strict=True)
    ]
    labels = {
        f"{prefix}{label}": str(label)
        for part, prefix in zip(parts, prefixes, strict=True)
        for label in part.categories
    }
    batches, codes = _joined(named)
    return batches, tuple(labels[batch] for batch in batches), codes


def _joined(parts: Sequence[pd.Categorical]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the sorted labels that occur, and the codes of all cells, int32."""
    used = [part.remove_unused_categories() for part in parts]
    labels = sorted({str(label) for part in used for label in part.categories})
    position = {label: code for code, label in enumerate(labels)}
    codes = []
    for part in used:
        lookup = np.array([*(position[str(label)] for label in part.categories), -1], dtype=np.int32)
        codes.append(lookup[part.codes])
    return tuple(labels), np.concatenate(codes)
