"""A valid submission of random cells, to test the upload. It follows every rule and predicts nothing.

Invariants: the cells of a target depend on the seed, the context and the target alone. They go through the normal check
and packing. Memory holds one target's cells at a time.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pertcast.errors import SubmissionError
from pertcast.files.artefacts import claimed, read_manifest, require_replaceable, write_manifest
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.files.resources import describe_write_error, require_space
from pertcast.files.season_lists import TargetList, read_gene_list, read_targets
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.stats.draws import generator
from pertcast.submission.cell_budget import plan_budget
from pertcast.submission.check.check import resolve_season
from pertcast.submission.pack import PackOptions, pack
from pertcast.submission.season_bundle import contexts_in_force

DEFAULT_COUNTS = 500
_TARGET_SUM = 1e4
_SPREAD_OF_GENES = 1.5
_CONTROLS_PER_CELL = 20
_BYTES_PER_VALUE = 12


class _Group(NamedTuple):
    context: str
    label: str
    num_cells: int


class RandomCells(NamedTuple):
    """How random cells are drawn."""

    seed: int = 0
    counts_per_cell: int = DEFAULT_COUNTS


def sample(
    out: Path,
    *,
    season: str | Season,
    genes: Path,
    targets: Path,
    cells: RandomCells | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Path:
    r"""Write a valid archive of random cells.

    >>> from pertcast.seasons import season
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "genes.csv").write_text("TP53\nMYC\nTET1\n")
    >>> _ = (folder / "targets.csv").write_text("target_gene,n_cells\nMYC,20\n")
    >>> lists = {"genes": folder / "genes.csv", "targets": folder / "targets.csv"}
    >>> sample(folder / "try.vcc", season=season("vcc2025", {"num_genes": 3}), **lists).name
    'try.vcc'
    """
    in_force = resolve_season(season, {})
    seed, counts_per_cell = cells or RandomCells()
    if counts_per_cell < 1:
        raise SubmissionError(f"counts per cell: expected at least 1, got {counts_per_cell}; give a larger number")
    for path in (genes, targets):
        if out.exists() and path.exists() and out.samefile(path):
            raise SubmissionError(f"{out}: the archive would replace a list; give another --out")
    require_replaceable(out, force=force)
    names = read_gene_list(genes, in_force)
    groups = _plan(contexts_in_force(in_force, targets, genes)[0], read_targets(targets, in_force))
    scratch = out.with_name(f"{out.name}.sample")
    try:
        with claimed(scratch):
            num_values = sum(group.num_cells for group in groups) * min(counts_per_cell, len(names))
            require_space(out, num_values * _BYTES_PER_VALUE, what="the random cells and their archive")
            with tempfile.TemporaryDirectory(prefix=f".{scratch.name}.partial-", dir=out.parent) as folder:
                path = Path(folder) / "cells.h5ad"
                _write(path, groups, in_force, names, seed=seed, counts_per_cell=counts_per_cell, progress=progress)
                pack(
                    path,
                    out,
                    season=in_force,
                    genes=genes,
                    targets=targets,
                    progress=progress,
                    options=PackOptions(force=force),
                )
    except OSError as error:
        raise SubmissionError(describe_write_error(out, error)) from error
    note = f"random cells of seed {seed}, to try the upload with: no prediction"
    progress.note(note)
    manifest = read_manifest(out, kind="submission")
    write_manifest(out, dataclasses.replace(manifest, notes=tuple(dict.fromkeys((*manifest.notes, note)))))
    return out


def _plan(season: Season, targets: TargetList) -> list[_Group]:
    """Return the groups of cells in their order: control cells first, then each context's targets."""
    contexts = season.contexts[0] if season.contexts else ("",)
    asked = targets.requested()
    total = sum(asked.values()) * len(contexts)
    if season.cells_per_target is not None and total > season.max_cells:
        raise SubmissionError(
            f"{len(targets):,} targets of {season.cells_per_target:,} cells in {len(contexts)} context(s) are "
            f"{total:,} cells, and the season allows {season.max_cells:,}; give a shorter list, or --set max_cells=..."
        )
    num_controls = max(1, min(total, season.max_cells) // _CONTROLS_PER_CELL) if season.controls == "required" else 0
    cells = plan_budget(asked, cap=season.max_cells, num_controls=num_controls).cells
    groups = [_Group(context, target, cells[target]) for context in contexts for target in targets]
    return [_Group(contexts[0], season.control_label, num_controls)] * (num_controls > 0) + groups


def _write(
    path: Path,
    groups: list[_Group],
    season: Season,
    genes: tuple[str, ...],
    *,
    seed: int,
    counts_per_cell: int,
    progress: Progress,
) -> None:
    rate = generator(seed, "sample", "genes").lognormal(sigma=_SPREAD_OF_GENES, size=len(genes))
    cumulative = np.cumsum(rate / rate.sum())
    total = sum(group.num_cells for group in groups)
    with progress.task("draw cells", total, "cells") as advance, CsrWriter(path, genes) as writer:
        for group in groups:
            writer.append(_draw(group, season, cumulative, seed=seed, counts_per_cell=counts_per_cell))
            advance(group.num_cells, detail=group.label)
        sizes = [group.num_cells for group in groups]
        obs = {season.pert_column: pd.Categorical(np.repeat([group.label for group in groups], sizes))}
        if season.context_column is not None:
            obs[season.context_column] = pd.Categorical(np.repeat([group.context for group in groups], sizes))
        writer.finish(pd.DataFrame(obs, index=pd.RangeIndex(total).astype(str)))


def _draw(
    group: _Group, season: Season, cumulative: NDArray[np.float64], *, seed: int, counts_per_cell: int
) -> sparse.csr_matrix:
    """Draw the cells of a group, CSR float32: each count goes to a gene by the genes' rates."""
    draws = generator(seed, "sample", group.context, group.label)
    totals = np.maximum(draws.poisson(counts_per_cell, size=group.num_cells), 1)
    if season.max_cell_sum is not None:
        totals = np.minimum(totals, season.max_cell_sum)
    rows = np.repeat(np.arange(group.num_cells), totals)
    columns = np.searchsorted(cumulative, draws.random(len(rows)) * cumulative[-1], side="right")
    shape = (group.num_cells, len(cumulative))
    cells = sparse.coo_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape).tocsr()
    if "log1p" in season.scales:
        factors = np.repeat((_TARGET_SUM / totals).astype(np.float32), np.diff(cells.indptr))
        cells.data = np.log1p(cells.data * factors)
    return cells
