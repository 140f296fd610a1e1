"""Check a prediction, rewrite it to the packed form if needed, and write the season's archive; unpack one.

Invariants: the content is what the official packer packs: X as CSR float32, obs with the season's labels alone and
cells named "0", "1", ..., var with gene names alone. A refused prediction or a full disk leaves nothing behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pertcast.errors import DataError, SubmissionError
from pertcast.files.artefacts import (
    Manifest,
    atomic_file,
    claimed,
    hash_file,
    is_current,
    manifest_path,
    prediction_provenance,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.files.obs import reading
from pertcast.files.resources import describe_write_error, require_space
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.submission.archive import (
    DEFAULT_LEVEL,
    LEVELS,
    META,
    Packed,
    estimate_packed,
    extract_archive,
    write_archive,
)
from pertcast.submission.check import CheckReport
from pertcast.submission.check.check import UnreadableError, examination, resolve_season
from pertcast.submission.season_bundle import meta_json, read_bundle

_BLOCK_VALUES = 1 << 21
_BYTES_PER_VALUE = 8
_SLACK_BYTES = 1 << 24
_ENCODINGS = ("csr_matrix", b"csr_matrix")


def is_canonical(reader: H5adReader, season: Season, genes: Sequence[str]) -> bool:
    """Return whether an open file already has the packed form, apart from the order of column indices."""
    plain = reader.layout == "csr" and reader.dtype == np.float32 and reader.obs_columns == _columns(season)
    if not plain or reader.genes != tuple(genes):
        return False
    if not np.array_equal(reader.obs_names(), np.arange(reader.num_cells).astype(str).astype(object)):
        return False
    with h5py.File(reader.path, "r") as file, reading(reader.path, "X"):
        others = [node for name, node in file.items() if name not in ("X", "obs", "var")]
        alone = all(isinstance(node, h5py.Group) and not len(node) for node in others)
        matrix = file["X"]
        parts = set(matrix) == {"data", "indices", "indptr"} and matrix.attrs.get("encoding-type") in _ENCODINGS
        unfiltered = parts and all(not matrix[name].id.get_create_plist().get_nfilters() for name in matrix)
        narrow = parts and matrix["indices"].dtype == np.int32
        labelled = all(isinstance(file["obs"][column], h5py.Group) for column in _columns(season))
        bare = len(file["var"]) == 1 and len(file["obs"]) == 1 + len(_columns(season))
    most = reader.num_stored * _BYTES_PER_VALUE * 1.01 + reader.num_cells * 64 + reader.num_genes * 64 + _SLACK_BYTES
    return bool(alone and unfiltered and narrow and labelled and bare) and reader.path.stat().st_size <= most


def _columns(season: Season) -> tuple[str, ...]:
    """Return the columns of obs that are packed."""
    return (season.pert_column, season.context_column) if season.context_column else (season.pert_column,)


def rewrite_canonical(
    path: Path, out: Path, *, season: Season, genes: Sequence[str], normalise: bool, progress: Progress
) -> int:
    """Write the cells in the packed form."""
    stored = 0
    with open_h5ad(path) as reader, CsrWriter(out, genes) as writer:
        totals = _totals(reader) if normalise else None
        median = np.float32(1.0) if totals is None else np.median(totals)
        with progress.task("slim down", reader.num_cells, "cells") as advance:
            for first, block in _ordered(reader, genes):
                if totals is not None:
                    block = _normalised(block, totals[first : first + block.shape[0]], median)
                writer.append(block)
                stored += int(np.count_nonzero(block.data))
                advance(block.shape[0])
        labels = {name: pd.Categorical(np.asarray(reader.obs(name), dtype=object)) for name in _columns(season)}
        names = pd.RangeIndex(reader.num_cells).astype(str)
        writer.finish(pd.DataFrame(labels, index=names))
    return stored


def _ordered(reader: H5adReader, genes: Sequence[str]) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield row blocks with the columns in the order of `genes`."""
    if reader.genes == tuple(genes):
        yield from reader.chunks(max_values=_BLOCK_VALUES)
        return
    place = {gene: number for number, gene in enumerate(genes)}
    new = np.array([place[gene] for gene in reader.genes], dtype=np.int32)
    for first, block in reader.chunks(max_values=_BLOCK_VALUES):
        moved = sparse.csr_matrix((block.data, new[block.indices], block.indptr), shape=block.shape)
        moved.has_sorted_indices = False
        moved.sort_indices()
        yield first, moved


def _totals(reader: H5adReader) -> NDArray[np.float32]:
    """Return the counts of each cell, (num_cells,) float32."""
    sums = [np.asarray(block.sum(axis=1)).ravel() for _, block in reader.chunks(max_values=_BLOCK_VALUES)]
    return np.concatenate(sums).astype(np.float32)


def _normalised(block: sparse.csr_matrix, totals: NDArray[np.float32], median: np.floating) -> sparse.csr_matrix:
    """Return log1p(counts / (total / median)), in float32 at every step like the official packer."""
    factors = (totals / median).astype(np.float32)
    factors[factors == 0] = 1
    data = np.log1p(block.data.astype(np.float32) / np.repeat(factors, np.diff(block.indptr)))
    return sparse.csr_matrix((data, block.indices, block.indptr), shape=block.shape)


_NORMALISED = "counts were scaled to the median of the cells' totals and log1p was taken, as the official packer does"


class PackOptions(NamedTuple):
    """How hard zstd compresses (1 to 19), and whether a file that pertcast did not write may be replaced."""

    level: int = DEFAULT_LEVEL
    force: bool = False


def pack(
    path: Path,
    out: Path,
    *,
    season: str | Season,
    genes: Path,
    targets: Path | None = None,
    options: PackOptions | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Check a prediction and write its archive.

    Parameters
    ----------
    path
        The prediction, an h5ad file. Where the season takes log1p, counts are scaled to the median of the cells'
        totals, then log1p is taken, as the official packer does; this is noted.
    out
        The archive, a ``.vcc`` file; one that is there and current is kept.
    season, genes, targets
        As for :func:`pertcast.submission.check.check`; a season with other rules is
        :func:`pertcast.seasons.season` of its name and rules.
    options
        zstd's level, and whether to replace a file at `out` that pertcast did not write.

    Raises
    ------
    SubmissionError
        With every problem that the check finds, or if the archive cannot be written; there is no archive then.

    Examples
    --------
    >>> import pandas as pd
    >>> from scipy import sparse
    >>> from pertcast.files.h5ad_writer import CsrWriter
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "genes.csv").write_text("TP53")
    >>> with CsrWriter(folder / "p.h5ad", ["TP53"]) as writer:
    ...     writer.append(sparse.csr_matrix([[0.5], [1.5]]))
    ...     writer.finish(pd.DataFrame({"target_gene": pd.Categorical(["TP53", "non-targeting"])}))
    >>> from pertcast.seasons import season
    >>> one_gene = season("vcc2025", {"num_genes": 1})
    >>> vcc = pack(folder / "p.h5ad", folder / "p.vcc", season=one_gene, genes=folder / "genes.csv")
    >>> unpack(vcc, folder / "again.h5ad").read_bytes() == (folder / "p.h5ad").read_bytes()
    True
    """
    in_force = resolve_season(season, {})
    level, force = options or PackOptions()
    if level not in LEVELS:
        raise SubmissionError(f"level {level}: expected {LEVELS.start} to {LEVELS.stop - 1}; 3 is what others use")
    if out.exists() and path.exists() and out.samefile(path):
        raise SubmissionError(f"{out}: the archive would replace the prediction; give another --out")
    job = _Job(path, out, in_force, genes, targets, level, progress)
    try:
        with claimed(out) as interrupted:
            if not job.is_done():
                require_replaceable(out, force=force, interrupted=interrupted)
                job.do()
    except OSError as error:
        raise SubmissionError(describe_write_error(out, error)) from error
    return out


class _Job:
    """One prediction to pack."""

    def __init__(
        self, path: Path, out: Path, season: Season, genes: Path, targets: Path | None, level: int, progress: Progress
    ) -> None:
        self._path, self._out, self._season, self._level = path, out, season, level
        self._genes, self._targets, self._progress = genes, targets, progress
        overrides = {rule: getattr(season, rule) for rule in season.overridden}
        self._config = {"season": season.name, "rules": overrides, "level": level}

    def _inputs(self, prediction: str) -> dict[str, str]:
        lists = {"genes": self._genes} | ({"targets": self._targets} if self._targets else {})
        bundle = read_bundle(self._targets, self._genes) if self._season.contexts is not None else None
        if bundle is not None:
            lists["bundle"] = bundle.path
        return {"prediction": prediction} | {name: hash_file(path) for name, path in lists.items()}

    def is_done(self) -> bool:
        """Return whether the archive can be reused; repeat its notes then."""
        sources = [path for path in (self._path, self._genes, self._targets) if path is not None]
        if not (self._out.is_file() and manifest_path(self._out).is_file() and all(map(Path.is_file, sources))):
            return False
        inputs = self._inputs(hash_file(self._path))
        if not is_current(self._out, kind="submission", inputs=inputs, config=self._config):
            return False
        for note in (*read_manifest(self._out).notes, f"{self._out} is up to date"):
            self._progress.note(note)
        return True

    def do(self) -> None:
        """Check the prediction, rewrite it if it is not in the packed form already, and write the archive."""
        try:
            with examination(self._path, season=self._season, genes=self._genes, targets=self._targets) as examined:
                report = examined.finish(self._progress)
                genes = examined.genes
                as_it_is = is_canonical(examined.reader, self._season, genes) and examined.reader.in_order
        except UnreadableError as error:
            raise self._refused(error.report) from error
        if not report.ok:
            raise self._refused(report)
        if as_it_is and not self._normalises(report):
            require_space(self._out, estimate_packed(self._path, level=self._level), what="the archive")
            with atomic_file(self._out) as temporary:
                packed = self._write(self._path, temporary, report.facts)
                self._finish(packed, report, packed.source, report.facts)
            return
        values = int(report.facts["nonzero_values"])  # type: ignore[arg-type]
        require_space(self._out, int(values * 8 * 1.5), what="the rewritten prediction and its archive")
        with (
            atomic_file(self._out) as temporary,
            tempfile.TemporaryDirectory(prefix=f".{self._out.name}.partial-", dir=self._out.parent) as folder,
        ):
            source, normalise = Path(folder) / "pred.h5ad", self._normalises(report)
            stored = rewrite_canonical(
                self._path, source, season=self._season, genes=genes, normalise=normalise, progress=self._progress
            )
            facts = {**report.facts, "stored_values": stored}
            packed = self._write(source, temporary, facts)
            self._finish(packed, report, hash_file(self._path), facts)

    def _refused(self, report: CheckReport) -> SubmissionError:
        head = f"{self._path}: not packed, {len(report.problems)} problem(s) found by the check"
        return SubmissionError(head, problems=report.problems)

    def _normalises(self, report: CheckReport) -> bool:
        return report.facts["scale"] == "counts" and "log1p" in self._season.scales

    def _write(self, source: Path, temporary: Path, facts: Mapping[str, Any]) -> Packed:
        meta = meta_json(self._season, facts=facts, targets=self._targets) if META in self._season.members else None
        return write_archive(
            source, temporary, season=self._season, level=self._level, meta=meta, progress=self._progress
        )

    def _finish(self, packed: Packed, report: CheckReport, prediction: str, facts: Mapping[str, Any]) -> None:
        """Write the manifest, just before the archive takes its name."""
        notes = list(report.notes)
        if self._normalises(report):
            notes.append(_NORMALISED)
            facts = {**facts, "scale": "log1p"}
        for note in notes:
            self._progress.note(note)
        manifest = Manifest(
            "submission",
            inputs=self._inputs(prediction),
            config=self._config,
            files={self._out.name: packed.archive},
            facts={**facts, **prediction_provenance(self._path, prediction)},
            notes=tuple(notes),
        )
        write_manifest(self._out, manifest)


def unpack(vcc: Path, out: Path, *, force: bool = False, progress: Progress = SILENT) -> Path:
    """Take the h5ad out of an archive, of this or of the official packer.

    Parameters
    ----------
    vcc
        The archive. Names, kinds and sizes of its members are checked; nothing but the h5ad is written.
    out
        The h5ad file to write; a manifest beside it says which archive it is from.
    force
        Whether to replace a file at `out` that pertcast did not write.

    Raises
    ------
    SubmissionError
        If it is no archive of a season, is truncated or damaged, or what is in it is no h5ad.
    """
    if out.exists() and vcc.exists() and out.samefile(vcc):
        raise SubmissionError(f"{out}: the h5ad would replace the archive; give another --out")
    try:
        with claimed(out) as interrupted:
            require_replaceable(out, force=force, interrupted=interrupted)
            with atomic_file(out) as temporary:
                extract_archive(vcc, temporary, progress=progress)
                _open(vcc, temporary)
                files = {out.name: hash_file(temporary)}
                write_manifest(out, Manifest("unpacked", inputs={"archive": hash_file(vcc)}, files=files))
    except OSError as error:
        raise SubmissionError(describe_write_error(out, error)) from error
    return out


def _open(vcc: Path, path: Path) -> None:
    try:
        with open_h5ad(path):
            pass
    except DataError as error:
        raise SubmissionError(f"{vcc}: what is in it is no h5ad file ({error}); pack the prediction again") from error
