"""Pseudobulk statistics of a file of cells for the metrics, read in blocks and cached by content.

The arithmetic is cell-eval's, down to the precision of each step, since it decides ties: counts are divided by their
cell's total over the median total, then log1p. Fold changes are of means rounded as pdex rounds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.artefacts import atomic_file, hash_file
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.files.resources import available_cpus
from pertcast.files.scales import MAX_LOG1P, Scale, ScaleEvidence
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.stats.de import differential_expression
from pertcast.stats.groups import CellGroups, count_entries, entry_starts, group_means, place_entries
from pertcast.stats.metrics import is_significant

_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class PseudobulkStats:
    """Statistics of real or predicted cells (P perturbations without the control, G genes)."""

    perts: tuple[str, ...]  # Names; the perturbations are sorted
    genes: tuple[str, ...]
    num_cells: NDArray[np.int64]  # (P,) cells of each perturbation
    means_log1p: NDArray[np.floating]  # (P, G) and (G,), in the number type of the file
    control_mean_log1p: NDArray[np.floating]
    significant: NDArray[np.bool_]  # (P, G) whether the gene is DE against the control cells of the same file
    log2_fold_change: NDArray[np.float32]  # (P, G) float32

    @property
    def effects(self) -> NDArray[np.floating]:
        """Mean log1p minus the control's, (P, G)."""
        return self.means_log1p - self.control_mean_log1p


def select_perts(side: PseudobulkStats, perts: Sequence[str]) -> PseudobulkStats:
    """Return the statistics of some perturbations, in the order given."""
    rows = np.array([side.perts.index(pert) for pert in perts], dtype=np.int64)
    return dataclasses.replace(
        side,
        perts=tuple(perts),
        num_cells=side.num_cells[rows],
        means_log1p=side.means_log1p[rows],
        significant=side.significant[rows],
        log2_fold_change=side.log2_fold_change[rows],
    )


class LabelledGroups(NamedTuple):
    """Groups of cells by label, with their names; labels with too few cells are left out."""

    groups: CellGroups
    names: tuple[str, ...]
    kept: NDArray[np.int64]
    control: int
    genes: tuple[str, ...]
    from_dense: bool


def cache_folder() -> Path:
    """Return the folder of cached truths: ``$PERTCAST_CACHE``, else ``pertcast`` in the user's cache folder."""
    named = os.environ.get("PERTCAST_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pertcast"


def read_side(path: Path, rules: Season, *, cache: Path | None = None, progress: Progress = SILENT) -> PseudobulkStats:
    """Read the cells of a file and return their statistics."""
    if cache is None:
        (side,) = _sides(read_groups(path, rules, progress=progress), parts=1)
        return side
    if not path.is_file():
        raise DataError(problems=[Problem(str(path), "no such file", "give the path of a .h5ad file")])
    content = _FORMAT, hash_file(path), rules.pert_column, rules.control_label, str(rules.max_log1p)
    key = hashlib.sha256("\0".join(content).encode()).hexdigest()
    kept = cache / f"truth-{key[:32]}.npz"
    found = _load(kept)
    if found is not None:
        progress.note(f"{path}: its statistics were kept from an earlier score ({kept})")
        return found
    (side,) = _sides(read_groups(path, rules, progress=progress), parts=1)
    _save(side, kept)
    return side


def read_halves(
    path: Path, rules: Season, *, seed: int = 0, progress: Progress = SILENT
) -> tuple[PseudobulkStats, PseudobulkStats]:
    """Split the cells of each label at random into two equal halves, and return both statistics."""
    read = read_groups(path, rules, halves=np.random.default_rng(seed), progress=progress)
    first, second = _sides(read, parts=2)
    return first, second


def read_groups(
    path: Path, rules: Season, *, halves: np.random.Generator | None = None, progress: Progress = SILENT
) -> LabelledGroups:
    """Read cells by label; with a generator, each label's cells as two random halves."""
    column, control_label = rules.pert_column, rules.control_label
    with open_h5ad(path) as reader:
        labels = reader.obs(column)
        names, codes = _sorted_labels(path, column, labels)
        if control_label not in names or len(names) < 2:
            what = "cells of another label" if control_label in names else f"control cells {control_label!r}"
            there = ", ".join(repr(str(name)) for name in names[:5]) + (" ..." if len(names) > 5 else "")
            remedy = "score a file that has both; --rule control_label=... names another control"
            raise DataError(problems=[Problem(f"{path}, obs[{column!r}]", f"expected {what}, got {there}", remedy)])
        kept = np.arange(len(names))
        if halves is not None:
            codes, kept = _halve(codes, labels, names, halves)
            if control_label not in names[kept] or len(kept) < 2:
                raise DataError(f"{path}: too few cells to halve; the ceiling needs two control cells and two others")
        limit = MAX_LOG1P if rules.max_log1p is None else rules.max_log1p
        num_groups = (1 if halves is None else 2) * len(names)
        groups = _read_values(reader, codes, num_groups, max_log1p=limit, progress=progress)
        control = int(np.flatnonzero(names == control_label)[0])
        return LabelledGroups(groups, tuple(map(str, names)), kept, control, reader.genes, reader.layout == "dense")


def make_side(
    groups: CellGroups, control: CellGroups, perts: tuple[str, ...], genes: tuple[str, ...], *, from_dense: bool = False
) -> PseudobulkStats:
    """Return the statistics of perturbed and control cells in sorted groups, log1p."""
    dtype = groups.values.dtype
    table = differential_expression(groups, control, from_dense=from_dense, threads=available_cpus())
    return PseudobulkStats(
        perts=perts,
        genes=genes,
        num_cells=groups.sizes,
        means_log1p=group_means(groups)[0].astype(dtype),
        control_mean_log1p=group_means(control)[0][0].astype(dtype),
        significant=is_significant(table.fdr),
        log2_fold_change=table.log2_fold_change.astype(np.float32),
    )


def _sides(read: LabelledGroups, *, parts: int) -> Iterator[PseudobulkStats]:
    perts = read.kept[read.kept != read.control]
    for part in range(parts):
        ours = read.groups.select(part * len(read.names) + perts)
        theirs = read.groups.select([part * len(read.names) + read.control])
        names = tuple(read.names[pert] for pert in perts)
        yield make_side(ours, theirs, names, read.genes, from_dense=read.from_dense)


def _sorted_labels(path: Path, column: str, labels: pd.Categorical) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    codes = np.asarray(labels.codes, dtype=np.int64)
    if (codes < 0).any():
        row = int(np.flatnonzero(codes < 0)[0])
        raise DataError(
            problems=[
                Problem(
                    f"{path}, obs[{column!r}], row {row}",
                    f"{int((codes < 0).sum()):,} cells have no label",
                    "label them, or leave them out",
                )
            ]
        )
    names, place = np.unique(np.asarray(labels.categories, dtype=str), return_inverse=True)
    there = np.zeros(len(names), dtype=bool)
    there[place[np.unique(codes)]] = True
    return names[there], (np.cumsum(there) - 1)[place[codes]]


def _halve(
    codes: NDArray[np.int64], labels: pd.Categorical, names: NDArray[np.str_], random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return codes of the first and the second half (plus the number of names) or -1, and the kept names."""
    halved = np.full(len(codes), -1, dtype=np.int64)
    position = {name: number for number, name in enumerate(names)}
    kept = []
    for label in labels.categories:  # in the file's order, in which cell-eval draws
        code = position.get(str(label), -1)
        shuffled = random.permutation(np.flatnonzero(codes == code)) if code >= 0 else np.empty(0, dtype=np.int64)
        half = len(shuffled) // 2
        if half:
            halved[shuffled[:half]], halved[shuffled[half : 2 * half]] = code, code + len(names)
            kept.append(code)
    return halved, np.sort(np.array(kept, dtype=np.int64))


def _read_values(
    reader: H5adReader, codes: NDArray[np.int64], num_groups: int, *, max_log1p: float, progress: Progress
) -> CellGroups:
    """Read the file twice: first its scale and the place of each value, then the values."""
    evidence = ScaleEvidence(str(reader.path), genes=reader.genes, max_log1p=max_log1p)
    counts = np.zeros((num_groups, reader.num_genes), dtype=np.int64)
    totals = np.zeros(reader.num_cells)
    with progress.task(f"survey {reader.path.name}", reader.num_cells, "cells") as advance:
        for first, block in reader.chunks():
            evidence.add_csr(block, first_cell=first)
            rows = slice(first, first + block.shape[0])
            totals[rows] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            count_entries(block, codes[rows], counts)
            advance(block.shape[0])
    # a file of 0 and 1 is on the counts scale to `check` and cell-eval
    scale: Scale = "counts" if evidence.ambiguous and evidence.max_value else evidence.verdict()
    dtype = np.dtype(np.float64 if reader.dtype == np.float64 else np.float32)
    factors = _factors(totals.astype(dtype), from_dense=reader.layout == "dense")
    starts = entry_starts(counts)
    cursor, values = starts[:, :-1].copy(), np.empty(int(counts.sum()), dtype=dtype)
    with progress.task(f"read {reader.path.name}", reader.num_cells, "cells") as advance:
        for first, block in reader.chunks():
            rows = slice(first, first + block.shape[0])
            log1p = _log1p(block, scale, factors[rows], dtype)
            place_entries(log1p, codes[rows], cursor=cursor, values=values, threads=available_cpus())
            advance(block.shape[0])
    return CellGroups(values, starts, np.bincount(codes[codes >= 0], minlength=num_groups).astype(np.int64))


def _factors(totals: NDArray[np.floating], *, from_dense: bool) -> NDArray[np.floating]:
    """Return the divisor of each cell's counts: its total over the median total, 1 for an empty cell."""
    counted = totals[totals > 0] if from_dense else totals
    factors = totals / (np.median(counted) if len(counted) and np.median(counted) > 0 else totals.dtype.type(1))
    return np.where(factors == 0, totals.dtype.type(1), factors).astype(totals.dtype)


def _log1p(block: sparse.csr_matrix, scale: Scale, factors: NDArray[np.floating], dtype: np.dtype) -> sparse.csr_matrix:
    values = block.data.astype(dtype, copy=False)
    if scale == "counts":
        values = values / np.repeat(factors, np.diff(block.indptr))
        np.log1p(values, out=values)
    return sparse.csr_matrix((values, block.indices, block.indptr), shape=block.shape, copy=False)


def _save(side: PseudobulkStats, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            perts=np.array(side.perts),
            genes=np.array(side.genes),
            num_cells=side.num_cells,
            means_log1p=side.means_log1p,
            control_mean_log1p=side.control_mean_log1p,
            significant=side.significant,
            log2_fold_change=side.log2_fold_change,
        )


def _load(path: Path) -> PseudobulkStats | None:
    """Return cached statistics; ``None`` if there are none or they are damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        return PseudobulkStats(
            **{**arrays, "perts": tuple(map(str, arrays["perts"])), "genes": tuple(map(str, arrays["genes"]))}
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, BadZipFile, KeyError, TypeError):
        return None
