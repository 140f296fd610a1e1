"""Writes the arrays of a store in three passes: over the input, over its TRAIN cells to fit, and to copy the HVGs.

Invariants: memory is bounded by the block size and a few numbers a cell; nothing is fitted on a cell outside TRAIN.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from scipy import sparse

from pertcast.config import Experiment
from pertcast.data.entries import GrowingArray, ValueArray
from pertcast.data.experiment import CellTable
from pertcast.data.genes import GeneMap
from pertcast.data.hvg import Moments, choose_hvgs
from pertcast.data.split import Split
from pertcast.data.values import worth_a_copy, write_hvg_values
from pertcast.errors import DataError, Problem
from pertcast.files.csc import row_bands
from pertcast.files.expression import Scale, ScaleEvidence, common_scale, normalise_log1p, row_sums
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.files.logarithms import log_problem
from pertcast.progress import Advance

__all__ = [
    "Fitted",
    "StoreWriter",
    "embedding_key",
    "natural_log_factor",
    "scale_evidence",
    "total_of_log1p",
]

_BLOCK_VALUES = 1 << 22
_EMBEDDING_ROWS = 8192
_SAME_TOTAL = 0.01
_CHECKED_CELLS = 2000


def embedding_key(experiment: Experiment) -> str | None:
    """Return the obsm key that the model reads cells from, or ``None`` where it reads genes."""
    prefix, colon, key = experiment.model.input.partition(":")
    return key if prefix == "obsm" and colon else None


@dataclass(frozen=True, eq=False)
class Fitted:
    """What is fitted on TRAIN cells: the target sum, highly variable genes, and the mean control cell."""

    target_sum: float | None
    hvg: np.ndarray
    control_mean_log1p: np.ndarray


class StoreWriter:
    """Writes the arrays of a store into a folder, and fits what is fitted on TRAIN cells; a context manager."""

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
        """Take X of all files into the store, in blocks; gather what each file's values say about their scale."""
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
        """Decide the scale of all files, and close the values in the type that it needs."""
        self._scale = common_scale(self._evidence, asked=self._experiment.prepare.scale)
        if self._scale == "log1p":
            self._values.widen(np.dtype(np.float32))
        self._values.close()
        self._indices.close()
        np.save(self._folder / "indptr.npy", np.concatenate([[0], np.cumsum(self._num_values)]))
        if self._scale == "log1p":
            self._totals = _expm1_totals(self._folder)
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
        controls = trained & (self._cells.keys.pert_codes == self._control_code())
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
        """Write the highly variable genes of each cell together, too, where they are few."""
        if worth_a_copy(len(fitted.hvg), len(self._genes)):
            write_hvg_values(self._folder, fitted.hvg, num_genes=len(self._genes), advance=advance)

    def _cells_measuring(self, rows: np.ndarray) -> np.ndarray:
        """Return how many of some cells each gene was measured in, int64 (genes,)."""
        of_file = np.bincount(self._cells.keys.file_codes[rows], minlength=len(self._measured_FG))
        return np.asarray(of_file @ self._measured_FG)

    def _control_code(self) -> int:
        return self._cells.keys.perts.index(self._experiment.columns.control)

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
        """Return what a reader of the store wants to know, as JSON values."""
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
    """Return what gathers the evidence of a file's scale; its errors point to other matrices of the file."""
    is_x = reader.matrix_name == "X"
    others = ", ".join(map(repr, reader.layers)) if is_x else ""
    hint = f"; or set columns.layer to read another matrix of the file ({others})" if others else ""
    place = str(reader.path) if is_x else f"{reader.path}, {reader.matrix_name}"
    return ScaleEvidence(place, genes=reader.genes, hint=hint)


def natural_log_factor(reader: H5adReader, block: sparse.csr_matrix) -> float:
    """Return what the values of a file are multiplied by to be natural logarithms; 1 where they are, or are counts.

    Parameters
    ----------
    reader, block
        The file, and its first cells.

    Raises
    ------
    DataError
        If the cells are clearly on another logarithm than the file states.
    """
    evidence = scale_evidence(reader)
    base = reader.log_base() if reader.matrix_name == "X" else None
    if problem := log_problem(block[:_CHECKED_CELLS], evidence.place, base):
        raise DataError(problems=[problem._replace(remedy=problem.remedy + evidence.hint)])
    is_log = block.data.dtype.kind == "f" and bool((block.data != np.rint(block.data)).any())
    return float(np.log(base)) if is_log and base is not None else 1.0


def total_of_log1p(totals: np.ndarray, *, asked: float | Literal["median"]) -> tuple[float | None, str | None]:
    """Return the total that log1p cells were normalised to, ``None`` with a note where they have no common one.

    Raises
    ------
    DataError
        If another total is asked for: log1p values stay as they are.
    """
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


def _expm1_totals(folder: Path) -> np.ndarray:
    """Return what the log1p values of each cell of a store undo to in sum, float64 (num_cells,)."""
    indptr, data = np.load(folder / "indptr.npy"), np.load(folder / "data.npy", mmap_mode="r")
    parts = []
    for start, stop in itertools.pairwise(row_bands(indptr, max_values=_BLOCK_VALUES)):
        values = np.expm1(np.asarray(data[indptr[start] : indptr[stop]], dtype=np.float64))
        parts.append(row_sums(values, indptr[start : stop + 1] - indptr[start]))
    return np.concatenate(parts)
