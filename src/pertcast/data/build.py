"""Builds the training store from the files of an experiment, or finds that it is there and current.

Invariants: a store appears whole or not at all; all inputs are checked against each other before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pertcast.config import STORE_KEYS, Experiment, differences, value_at
from pertcast.data.experiment import CellTable, read_cells
from pertcast.data.genes import GeneMap, map_genes
from pertcast.data.split import CodedCells, Split, assign_split
from pertcast.data.writer import StoreWriter, embedding_key
from pertcast.errors import CheckpointError, DataError, Problem, Problems
from pertcast.files.artefacts import (
    MANIFEST,
    Manifest,
    atomic_dir,
    hash_files,
    read_manifest,
    write_manifest,
)
from pertcast.files.h5ad import open_h5ad
from pertcast.files.lock import claimed
from pertcast.files.season_lists import read_gene_list
from pertcast.progress import SILENT, Progress

__all__ = ["Survey", "prepare", "require_same_store", "store_identity", "survey"]


def store_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a resolved experiment a store depends on, by key."""
    reads = str(value_at(config, "model.input"))
    return {
        **{key: value_at(config, key) for key in STORE_KEYS},
        "model.input": reads if reads.startswith("obsm:") else None,
    }


def require_same_store(store: CodedCells, experiment: Experiment, made_with: Mapping[str, Any]) -> None:
    """Refuse a store that was made with other settings than the experiment has now.

    Files are compared by name: a store may be used where the data are in another folder, or not at all.

    Raises
    ------
    CheckpointError
        With every key that differs, and both values.
    """
    before, now = (_by_name(store_identity(config)) for config in (made_with, experiment.as_json()))
    problems = differences(before, now, list(STORE_KEYS), what="the store was made")
    if problems:
        raise CheckpointError(
            f"{store.path} was made with other settings; run `pertcast prepare` with this experiment, "
            "or change the experiment back",
            problems=problems,
        )


def _by_name(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity as a tree, with the names of files in place of their paths."""
    tree = {key: value for key, value in identity.items() if "." not in key}
    tree["datasets"] = {name: Path(pattern).name for name, pattern in tree["datasets"].items()}
    genes = identity["submission.genes"]
    tree["submission"] = {
        "genes": None if genes is None else Path(genes).name,
        "season": identity["submission.season"],
        "rules": identity["submission.rules"],
    }
    tree["model"] = {"input": identity["model.input"]}
    return tree


def prepare(experiment: Experiment, out: Path, *, progress: Progress = SILENT) -> Path:
    """Build the training store of an experiment in a folder, or leave it where it is there and current.

    Parameters
    ----------
    experiment
        What to read, and how to split it.
    out
        The folder; a store that is there is replaced when its inputs or its part of the configuration have changed.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    DataError
        If a file, a column, the scale, the genes or the split is wrong; nothing is left behind.
    """
    with claimed(out):
        return _prepare(experiment, out, progress)


def _prepare(experiment: Experiment, out: Path, progress: Progress) -> Path:
    cells = read_cells(experiment)
    inputs = _hash_inputs(experiment, cells, progress)
    if _is_current(experiment, out, inputs):
        progress.note(f"{out} is current: its inputs and its part of the experiment have not changed")
        return out
    found = survey(experiment, cells)
    flags = found.split
    with atomic_dir(out) as folder:
        with StoreWriter(experiment, cells, flags, found.genes, folder) as writer:
            with progress.task("prepare", len(flags), "cells") as advance:
                writer.read_values(list(found.gene_maps), advance)
            writer.settle_scale()
            with progress.task("fit", int((flags & Split.TRAIN > 0).sum()), "cells") as advance:
                fitted = writer.fit(advance)
            with progress.task("copy HVGs", len(flags), "cells") as advance:
                writer.copy_hvgs(fitted, advance)
        notes = (*found.notes, *writer.notes)
        manifest = Manifest(
            kind="store", inputs=inputs, config=experiment.as_json(), facts=writer.facts(fitted), notes=notes
        )
        write_manifest(folder, manifest)
    for note in notes:
        progress.note(note)
    return out


@dataclass(frozen=True, eq=False)
class Survey(CodedCells):
    """All that is known of an experiment's cells before their values are read; as :class:`Store` names it."""

    path: Path
    genes: tuple[str, ...]
    perts: tuple[str, ...]
    contexts: tuple[str, ...]
    datasets: tuple[str, ...]
    control: str
    split: np.ndarray
    dataset_codes: np.ndarray
    context_codes: np.ndarray
    pert_codes: np.ndarray
    files: tuple[tuple[str, Path, int], ...]
    gene_maps: tuple[GeneMap, ...]
    notes: tuple[str, ...]


def survey(experiment: Experiment, cells: CellTable | None = None) -> Survey:
    """Read what all cells are, split them and match the genes of all files; no value of X is read.

    Raises
    ------
    DataError
        With every problem of labels, split, genes and embeddings.
    """
    cells = read_cells(experiment) if cells is None else cells
    problems = Problems()
    with problems.collect():
        flags = assign_split(experiment, cells.keys)
    with problems.collect():
        genes, maps, gene_notes = _gene_maps(experiment, cells)
    with problems.collect():
        _check_embedding(experiment, cells)
    problems.raise_if_any()
    keys = cells.keys
    return Survey(
        path=cells.files[0][1] if len(cells.files) == 1 else cells.files[0][1].parent,
        genes=genes,
        perts=keys.perts,
        contexts=keys.contexts,
        datasets=keys.datasets,
        control=experiment.columns.control,
        split=flags,
        dataset_codes=keys.dataset_codes,
        context_codes=keys.context_codes,
        pert_codes=keys.pert_codes,
        files=cells.files,
        gene_maps=tuple(maps),
        notes=(*cells.notes, *gene_notes, *_unused_notes(cells, flags)),
    )


def _hash_inputs(experiment: Experiment, cells: CellTable, progress: Progress) -> dict[str, str]:
    paths = [path for _, path, _ in cells.files]
    if experiment.submission.genes is not None:
        paths.append(experiment.submission.genes)
    inputs = {}
    with progress.task("hash inputs", sum(path.stat().st_size for path in paths), "B") as advance:
        for path, found in zip(paths, hash_files(paths), strict=True):
            inputs[str(path)] = found
            advance(path.stat().st_size, path.name)
    first: dict[str, str] = {}
    problems = []
    for _, path, _ in cells.files:
        same = first.setdefault(inputs[str(path)], str(path))
        if same != str(path):
            problems.append(Problem(str(path), f"has the same content as {same}", "leave one of the two out"))
    if problems:
        raise DataError(problems=problems)
    return inputs


def _is_current(experiment: Experiment, out: Path, inputs: Mapping[str, str]) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(out)
    except CheckpointError:
        return False
    if manifest.kind != "store":
        problem = Problem(str(out), f"it is a {manifest.kind}, not a store", "give another --out, or remove it first")
        raise DataError(problems=[problem])
    whole = all((out / name).is_file() for name in manifest.files)
    same = store_identity(manifest.config) == store_identity(experiment.as_json())
    return whole and manifest.inputs == inputs and same


def _gene_maps(experiment: Experiment, cells: CellTable) -> tuple[tuple[str, ...], list[GeneMap], list[str]]:
    """Return the genes of the store, and how each file's columns go to them."""
    genes = cells.genes_of_file[0]
    if experiment.submission.genes is not None:
        genes = read_gene_list(experiment.submission.genes, experiment.submission.resolve())
    maps: list[GeneMap] = []
    notes: list[str] = []
    problems: list[Problem] = []
    fill = experiment.prepare.missing_genes == "zero"
    for (_, path, _), file_genes in zip(cells.files, cells.genes_of_file, strict=True):
        gene_map, of_file, problem = map_genes(path, file_genes, genes, fill_missing=fill)
        maps.append(gene_map)
        notes += of_file
        if problem:
            problems.append(problem)
    if problems:
        raise DataError(problems=problems)
    return genes, maps, notes


def _check_embedding(experiment: Experiment, cells: CellTable) -> None:
    """Refuse files without the embedding that the model reads, or with another width than the first's."""
    key = embedding_key(experiment)
    if key is None:
        return
    widths: dict[Path, int] = {}
    problems: list[Problem] = []
    for _, path, _ in cells.files:
        with open_h5ad(path) as reader:
            try:
                widths[path] = reader.embedding(key, 0, 1).shape[1]
            except DataError as error:
                problems += error.problems
    first = next(iter(widths.values()), 0)
    for path, width in widths.items():
        if width != first:
            message = f"expected {first} dimensions as in {cells.files[0][1].name}, got {width}"
            problems.append(Problem(f"{path}, obsm[{key!r}]", message, "embed all files with one model"))
    if problems:
        raise DataError(problems=problems)


def _unused_notes(cells: CellTable, flags: np.ndarray) -> list[str]:
    notes = []
    for dataset, context, rows in cells.keys.groups():
        unused = int((flags[rows] == 0).sum())
        if unused:
            notes.append(
                f"{unused:,} of {len(rows):,} cells of {dataset}.{context} are not used: "
                "it is in none of [training], [zeroshot] and [fewshot]"
            )
    return notes
