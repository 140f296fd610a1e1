"""A valid prediction to the season's archive and back: what ``check`` refuses is not packed.

Invariants: what is packed is what the official packer packs: X as CSR float32, obs with the season's labels alone and
cells named "0", "1", ..., var with gene names alone; the archive is read back before it takes its name; a prediction
that is refused, or a disk that is full, leaves nothing behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pertcast.errors import DataError, SubmissionError
from pertcast.files.artefacts import Manifest, atomic_file, hash_file, remove_leftovers, write_manifest
from pertcast.files.h5ad import CsrWriter, H5adReader, open_h5ad
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.submission.archive import DEFAULT_LEVEL, extract_archive, write_archive
from pertcast.submission.check import check
from pertcast.submission.check.whole import resolve_season
from pertcast.submission.meta import meta_json
from pertcast.submission.reuse import is_current

__all__ = ["DEFAULT_LEVEL", "pack", "unpack"]


def pack(
    path: Path,
    out: Path,
    *,
    season: str | Season,
    genes: Path,
    targets: Path | None = None,
    rules: Mapping[str, object] | None = None,
    level: int = DEFAULT_LEVEL,
    progress: Progress = SILENT,
) -> Path:
    """Check a prediction and write its archive.

    Parameters
    ----------
    path
        The prediction, an h5ad file. Where the season takes log1p, counts are scaled to the median of the cells'
        totals, then log1p is taken, as the official packer does; this is noted.
    out
        The archive, a ``.vcc`` file; one that is there and still true is kept.
    season, genes, targets, rules
        As for :func:`pertcast.submission.check.check`.
    level
        zstd's level.

    Raises
    ------
    SubmissionError
        With every problem that the check finds, or if the archive cannot be written; there is no archive then.

    Examples
    --------
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "genes.csv").write_text("TP53")
    >>> with CsrWriter(folder / "p.h5ad", ["TP53"]) as writer:
    ...     writer.append(sparse.csr_matrix([[0.5], [1.5]]))
    ...     writer.finish(pd.DataFrame({"target_gene": pd.Categorical(["TP53", "non-targeting"])}))
    >>> rules = {"num_genes": 1}
    >>> vcc = pack(folder / "p.h5ad", folder / "p.vcc", season="vcc2025", genes=folder / "genes.csv", rules=rules)
    >>> unpack(vcc, folder / "again.h5ad").read_bytes() == (folder / "p.h5ad").read_bytes()
    True
    """
    in_force = resolve_season(season, rules or {})
    if out.exists() and path.exists() and out.samefile(path):
        raise SubmissionError(f"{out}: the archive would replace the prediction; give another --out")
    report = check(path, season=in_force, genes=genes, targets=targets, progress=progress)
    if not report.ok:
        raise SubmissionError(
            f"{path}: not packed, {len(report.problems)} problem(s) found by the check", problems=report.problems
        )
    sources = {"prediction": path, "genes": genes} | ({"targets": targets} if targets else {})
    inputs = {name: hash_file(source) for name, source in sources.items()}
    overrides = {rule: getattr(in_force, rule) for rule in in_force.overridden}
    config = {"season": in_force.name, "rules": overrides, "level": level}
    notes = list(report.notes)
    normalise = report.facts["scale"] == "counts" and "log1p" in in_force.scales
    if normalise:
        notes.append(
            "counts were scaled to the median of the cells' totals and log1p was taken, as the official packer does"
        )
    for note in notes:
        progress.note(note)
    if is_current(out, kind="submission", inputs=inputs, config=config):
        progress.note(f"{out} is there and still true")
        return out
    facts = {**report.facts, "scale": "log1p" if normalise else report.facts["scale"]}
    _write(path, out, in_force, facts, targets, normalise=normalise, level=level, progress=progress)
    write_manifest(out, Manifest("submission", inputs=inputs, config=config, facts=facts, notes=tuple(notes)))
    return out


def _write(
    path: Path,
    out: Path,
    season: Season,
    facts: dict[str, Any],
    targets: Path | None,
    *,
    normalise: bool,
    level: int,
    progress: Progress,
) -> None:
    try:
        remove_leftovers(out)
        with (
            atomic_file(out) as temporary,
            tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as folder,
        ):
            source = path
            if normalise or not _is_slim(path, season):
                source = Path(folder) / "pred.h5ad"
                _write_slim(path, source, season, from_counts=normalise, progress=progress)
            with open_h5ad(source) as reader:
                facts["stored_values"] = reader.num_stored
            meta = meta_json(season, facts=facts, targets=targets) if "meta.json" in season.members else None
            write_archive(source, temporary, season=season, level=level, meta=meta, progress=progress)
    except OSError as error:
        raise SubmissionError(f"{out}: cannot be written ({error}); give another --out, or make room") from error


def _is_slim(path: Path, season: Season) -> bool:
    """Return whether a file is just what is to be packed: nothing but X, the target and names, in the right form."""
    with open_h5ad(path) as reader:
        names = reader.obs_names()
        if reader.layout != "csr" or reader.obs_columns != _columns(season):
            return False
        if not np.array_equal(names, np.arange(reader.num_cells).astype(str).astype(object)):
            return False
    with h5py.File(path, "r") as file:
        others = [node for name, node in file.items() if name not in ("X", "obs", "var")]
        empty = all(isinstance(node, h5py.Group) and not len(node) for node in others)
        labelled = all(isinstance(file["obs"][column], h5py.Group) for column in _columns(season))
        return empty and len(file["var"]) == 1 and labelled


def _columns(season: Season) -> tuple[str, ...]:
    """Return the columns of obs that are packed."""
    return (season.pert_column, season.context_column) if season.context_column else (season.pert_column,)


def _write_slim(path: Path, out: Path, season: Season, *, from_counts: bool, progress: Progress) -> None:
    """Write the cells with nothing but what is packed; counts are normalised on the way."""
    with open_h5ad(path) as reader, CsrWriter(out, reader.genes) as writer:
        totals = _totals(reader) if from_counts else None
        median = np.float32(1.0) if totals is None else np.median(totals)
        with progress.task("slim down", reader.num_cells, "cells") as advance:
            for first, block in reader.chunks():
                if totals is not None:
                    block = _normalised(block, totals[first : first + block.shape[0]], median)
                writer.append(block)
                advance(block.shape[0])
        labels = {name: pd.Categorical(np.asarray(reader.obs(name), dtype=object)) for name in _columns(season)}
        names = pd.RangeIndex(reader.num_cells).astype(str)
        writer.finish(pd.DataFrame(labels, index=names))


def _totals(reader: H5adReader) -> NDArray[np.float32]:
    """Return the counts of each cell, (num_cells,) float32."""
    sums = [np.asarray(block.sum(axis=1)).ravel() for _, block in reader.chunks()]
    return np.concatenate(sums).astype(np.float32)


def _normalised(block: sparse.csr_matrix, totals: NDArray[np.float32], median: np.floating) -> sparse.csr_matrix:
    """Return log1p(counts / (total / median)), in float32 at every step, so that it equals the official packer's."""
    factors = (totals / median).astype(np.float32)
    factors[factors == 0] = 1
    data = np.log1p(block.data.astype(np.float32) / np.repeat(factors, np.diff(block.indptr)))
    return sparse.csr_matrix((data, block.indices, block.indptr), shape=block.shape)


def unpack(vcc: Path, out: Path, *, progress: Progress = SILENT) -> Path:
    """Take the h5ad out of an archive, of this or of the official packer.

    Parameters
    ----------
    vcc
        The archive. Names, kinds and sizes of its members are checked; nothing but the h5ad is written.
    out
        The h5ad file to write.

    Raises
    ------
    SubmissionError
        If it is no archive of a season, is truncated or damaged, or what is in it is no h5ad.
    """
    if out.exists() and vcc.exists() and out.samefile(vcc):
        raise SubmissionError(f"{out}: the h5ad would replace the archive; give another --out")
    try:
        remove_leftovers(out)
        with atomic_file(out) as temporary:
            extract_archive(vcc, temporary, progress=progress)
            with open_h5ad(temporary):
                pass
    except DataError as error:
        raise SubmissionError(f"{vcc}: what is in it is no h5ad file ({error}); pack the prediction again") from error
    except OSError as error:
        raise SubmissionError(f"{out}: cannot be written ({error}); give another --out, or make room") from error
    return out
