"""Build the training store from the files of an experiment, or reuse a current one.

Invariants: a store is written atomically. All inputs are checked against each other before anything is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from scipy import sparse

from pertcast.config import STORE_KEYS, Experiment, differences, value_at
from pertcast.data.experiment import CellTable, read_cells
from pertcast.data.genes import GeneMap, Moments, choose_hvgs, map_genes
from pertcast.data.split import CodedCells, Split, assign_split
from pertcast.data.store_arrays import GrowingArray, ValueArray, worth_a_copy, write_hvg_values
from pertcast.errors import CheckpointError, DataError, Problem, Problems
from pertcast.files.artefacts import MANIFEST, Manifest, atomic_dir, claimed, hash_files, read_manifest, write_manifest
from pertcast.files.h5ad import H5adReader, open_h5ad, row_bands
from pertcast.files.scales import Scale, ScaleEvidence, common_scale, log_problem, normalise_log1p, row_sums
from pertcast.files.season_lists import read_gene_list
from pertcast.progress import SILENT, Advance, Progress

_BLOCK_VALUES = 1 << 22
_EMBEDDING_ROWS = 8192
_SAME_TOTAL = 0.01
_CHECKED_CELLS = 2000


def embedding_key(experiment: Experiment) -> str | None:
    """Return the obsm key of the model's input, or ``None`` if it reads genes."""
    prefix, colon, key = experiment.model.input.partition(":")
    return key if prefix == "obsm" and colon else None


@dataclass(frozen=True, eq=False)
class Fitted:
    """Values fitted on TRAIN cells: the target sum, highly variable genes, and the mean control cell."""

    target_sum: float | None
    hvg: np.ndarray
    control_mean_log1p: np.ndarray


class StoreWriter:
    """Write the arrays of a store and fit what is fitted on TRAIN cells."""

    def __init__(
        self, experiment: Experiment, cells: CellTable, flags: np.ndarray, genes: tuple[str, ...], folder: Path
    ) -> None:
        self._experiment, self._cells, self._flags, self._genes, self._folder = experiment, cells, flags, genes, folder
        self._totals = np.zeros(len(flags), dtype=np.float64)
        self._num_values = np.zeros(len(flags), dtype=np.int64)
        self._evidence: list[ScaleEvidence] = []
        self._scale: Scale = "counts"
        self.notes: list[str] = []
        index_dtype = np.dtype(np.uint16 if len(genes) <= 1 << 16 else np.int32)
        self._indices = GrowingArray(folder / "indices.npy", index_dtype)
        self._values = ValueArray(folder / "data.npy")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._indices.close()
        self._values.close()

    def read_values(self, maps: list[GeneMap], advance: Advance) -> None:
        """Copy X of all files into the store in blocks, and gather evidence on their scale."""
        self._measured_FG = np.stack([gene_map.measured for gene_map in maps])
        np.save(self._folder / "measured.npy", self._measured_FG)
        first = 0
        for (dataset, path, num_cells), gene_map in zip(self._cells.files, maps, strict=True):
            with open_h5ad(path, layer=self._experiment.columns.in_dataset(dataset).layer) as reader:
                evidence = scale_evidence(reader)
                factor = 1.0
                for start, block in reader.chunks(max_values=_BLOCK_VALUES):
                    if start == 0:
                        factor = natural_log_factor(reader, block)
                        if factor != 1:
                            self.notes.append(
                                f"{evidence.place}: converted from log{np.exp(factor):g} "
                                "(uns['log1p']['base']) to log1p"
                            )
                    if factor != 1:
                        block.data *= block.data.dtype.type(factor)
                    evidence.add_csr(block, first_cell=start)
                    kept = gene_map.apply(block)
                    self._values.append(kept.data, place=f"{path}, X")
                    self._indices.append(kept.indices)
                    rows = slice(first + start, first + start + block.shape[0])
                    self._num_values[rows] = np.diff(kept.indptr)
                    self._totals[rows] = row_sums(kept.data, kept.indptr)
                    advance(block.shape[0], path.name)
                self._evidence.append(evidence)
                self._save_embedding(reader, first)
            first += num_cells

    def _save_embedding(self, reader: H5adReader, first: int) -> None:
        key = embedding_key(self._experiment)
        if key is None:
            return
        path = self._folder / f"embedding_{key}.npy"
        for start in range(0, reader.num_cells, _EMBEDDING_ROWS):
            part = reader.embedding(key, start, min(start + _EMBEDDING_ROWS, reader.num_cells))
            if not np.isfinite(part).all():
                row = start + int(np.flatnonzero(~np.isfinite(part).all(axis=1))[0])
                place = f"{reader.path}, obsm[{key!r}], row {row}"
                raise DataError(problems=[Problem(place, "NaN or infinite", "compute the embedding again")])
            if not path.exists():
                shape = (len(self._flags), part.shape[1])
                array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            else:
                array = np.lib.format.open_memmap(path, mode="r+")
            array[first + start : first + start + len(part)] = part
            array.flush()
            del array

    def settle_scale(self) -> None:
        """Decide the scale of all files, and close the values with the type that it needs."""
        self._scale = common_scale(self._evidence, asked=self._experiment.prepare.scale)
        if self._scale == "log1p":
            self._values.widen(np.dtype(np.float32))
        self._values.close()
        self._indices.close()
        np.save(self._folder / "indptr.npy", np.concatenate([[0], np.cumsum(self._num_values)]))
        if self._scale == "log1p":
            indptr, data = np.load(self._folder / "indptr.npy"), np.load(self._folder / "data.npy", mmap_mode="r")
            parts = []
            for start, stop in itertools.pairwise(row_bands(indptr, max_values=_BLOCK_VALUES)):
                values = np.expm1(np.asarray(data[indptr[start] : indptr[stop]], dtype=np.float64))
                parts.append(row_sums(values, indptr[start : stop + 1] - indptr[start]))
            self._totals = np.concatenate(parts)
        np.save(self._folder / "totals.npy", self._totals.astype(np.float32))
        keys = self._cells.keys
        for name, codes in (
            ("pert_codes", keys.pert_codes),
            ("context_codes", keys.context_codes),
            ("dataset_codes", keys.dataset_codes),
            ("file_codes", keys.file_codes),
            ("batch_codes", self._cells.batch_codes),
        ):
            np.save(self._folder / f"{name}.npy", codes.astype(np.int32))
        np.save(self._folder / "split.npy", self._flags)
        empty = int((self._num_values == 0).sum())
        if empty:
            self.notes.append(f"{empty:,} cells have no count in these genes; they are kept, and stay 0")
        unclear = [Path(item.place).name for item in self._evidence if item.ambiguous]
        if unclear:
            self.notes.append(f"every value is 0 or 1 in {', '.join(unclear)}; taken as {self._scale}")

    def fit(self, advance: Advance) -> Fitted:
        """Fit the target sum, the highly variable genes and the mean control cell on TRAIN cells."""
        trained = (self._flags & Split.TRAIN) > 0
        target_sum = self._target_sum(trained)
        controls = trained & (
            self._cells.keys.pert_codes == self._cells.keys.perts.index(self._experiment.columns.control)
        )
        normalised, control_log1p = (Moments(self._cells_measuring(rows)) for rows in (trained, controls))
        indptr = np.load(self._folder / "indptr.npy")
        arrays = [np.load(self._folder / name, mmap_mode="r") for name in ("indices.npy", "data.npy")]
        for start, stop in itertools.pairwise(row_bands(indptr, max_values=_BLOCK_VALUES)):
            part = slice(int(indptr[start]), int(indptr[stop]))
            indices, data = (np.array(array[part]) for array in arrays)
            block = sparse.csr_matrix(
                (data, indices.astype(np.int32), indptr[start : stop + 1] - indptr[start]),
                shape=(int(stop - start), len(self._genes)),
            )[trained[start:stop]]
            if self._scale == "counts":
                block = normalise_log1p(block, self._totals[start:stop][trained[start:stop]], target_sum or 1.0)
            control_log1p.add(block[controls[start:stop][trained[start:stop]]])
            np.expm1(block.data, out=block.data)
            normalised.add(block)
            advance(block.shape[0])
        hvg = choose_hvgs(normalised.mean, normalised.variance, num=self._experiment.prepare.num_hvgs)
        fitted = Fitted(target_sum, hvg, control_log1p.mean.astype(np.float32))
        np.save(self._folder / "hvg.npy", fitted.hvg)
        np.save(self._folder / "control_mean_log1p.npy", fitted.control_mean_log1p)
        return fitted

    def copy_hvgs(self, fitted: Fitted, advance: Advance) -> None:
        """Write a second copy of the highly variable genes, if they are few."""
        if worth_a_copy(len(fitted.hvg), len(self._genes)):
            write_hvg_values(self._folder, fitted.hvg, num_genes=len(self._genes), advance=advance)

    def _cells_measuring(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of cells that measured each gene, (genes,)."""
        of_file = np.bincount(self._cells.keys.file_codes[rows], minlength=len(self._measured_FG))
        return np.asarray(of_file @ self._measured_FG)

    def _target_sum(self, trained: np.ndarray) -> float | None:
        asked = self._experiment.prepare.target_sum
        if self._scale == "counts":
            if asked != "median":
                return float(asked)
            filled = self._totals[trained & (self._totals > 0)]
            if not len(filled):
                problem = Problem("[prepare] target_sum", "every training cell is empty", "check the gene list")
                raise DataError(problems=[problem])
            return float(np.median(filled))
        total, note = total_of_log1p(self._totals, asked=asked)
        if note:
            self.notes.append(note)
        return total

    def facts(self, fitted: Fitted) -> dict[str, Any]:
        """Return what readers of the store need, as JSON values."""
        keys = self._cells.keys
        return {
            "num_cells": len(self._flags),
            "genes": list(self._genes),
            "perts": list(keys.perts),
            "contexts": list(keys.contexts),
            "datasets": list(keys.datasets),
            "files": list(keys.files),
            "batches": list(self._cells.batches),
            "batch_labels": list(self._cells.batch_labels),
            "control": self._experiment.columns.control,
            "scale": self._scale,
            "target_sum": fitted.target_sum,
            "num_values": int(self._num_values.sum()),
            "embedding_keys": [key for key in [embedding_key(self._experiment)] if key is not None],
            "cells_of_split": {
                "train": int((self._flags & Split.TRAIN > 0).sum()),
                "val": int((self._flags & Split.VAL > 0).sum()),
                "test": int((self._flags & Split.TEST > 0).sum()),
                "unused": int((self._flags == 0).sum()),
            },
        }


def scale_evidence(reader: H5adReader) -> ScaleEvidence:
    """Return the collector of a file's scale; its errors mention other matrices of the file."""
    is_x = reader.matrix_name == "X"
    others = ", ".join(map(repr, reader.layers)) if is_x else ""
    hint = f"; or set columns.layer to read another matrix of the file ({others})" if others else ""
    place = str(reader.path) if is_x else f"{reader.path}, {reader.matrix_name}"
    return ScaleEvidence(place, genes=reader.genes, hint=hint)


def natural_log_factor(reader: H5adReader, block: sparse.csr_matrix) -> float:
    """Return the factor that turns a file's values into natural logarithms; 1 for counts."""
    evidence = scale_evidence(reader)
    base = reader.log_base() if reader.matrix_name == "X" else None
    if problem := log_problem(block[:_CHECKED_CELLS], evidence.place, base):
        raise DataError(problems=[problem._replace(remedy=problem.remedy + evidence.hint)])
    is_log = block.data.dtype.kind == "f" and bool((block.data != np.rint(block.data)).any())
    return float(np.log(base)) if is_log and base is not None else 1.0


def total_of_log1p(totals: np.ndarray, *, asked: float | Literal["median"]) -> tuple[float | None, str | None]:
    """Return the total that log1p cells were normalised to; ``None`` and a note if there is no common one."""
    filled = totals[totals > 0]
    middle = float(np.median(filled))
    if np.abs(filled - middle).max() > _SAME_TOTAL * middle:
        return None, (
            f"the log1p values undo to totals from {filled.min():,.0f} to {filled.max():,.0f}: they were "
            "normalised over other genes or not to one total, so the target sum is unknown; values stay as they are"
        )
    if asked != "median" and abs(float(asked) - middle) > _SAME_TOTAL * middle:
        message = f"expected values normalised to {asked:,.0f}, got log1p values normalised to {middle:,.0f}"
        raise DataError(problems=[Problem("[prepare] target_sum", message, 'set it to "median", or give raw counts')])
    return middle, None


def store_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a store depends on, by key."""
    reads = str(value_at(config, "model.input"))
    return {
        **{key: value_at(config, key) for key in STORE_KEYS},
        "model.input": reads if reads.startswith("obsm:") else None,
    }


def require_same_store(store: CodedCells, experiment: Experiment, made_with: Mapping[str, Any]) -> None:
    """Refuse a store that was made with other settings than the experiment's."""
    before, now = (_by_name(store_identity(config)) for config in (made_with, experiment.as_json()))
    problems = differences(before, now, list(STORE_KEYS), what="the store was made")
    if problems:
        raise CheckpointError(
            f"{store.path} was made with other settings; run `pertcast prepare` with this experiment, "
            "or change the experiment back",
            problems=problems,
        )


def _by_name(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with file names in place of paths."""
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
    """Build the training store of an experiment, or leave it if it is current.

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
    """What is known of an experiment's cells before their values are read."""

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
    """Read the obs tables, split the cells and match the genes of all files, without reading X."""
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
    """Return the genes of the store, and the mapping of each file's genes."""
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
    """Refuse files without the model's embedding, or with different widths."""
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
