"""A valid prediction to the season's archive and back: what ``check`` refuses is not packed.

Invariants: what is packed is what the official packer packs: X as CSR float32, obs with the season's labels alone and
cells named "0", "1", ..., var with gene names alone; the archive is read back before it takes its name; a prediction
that is refused, or a disk that is full, leaves nothing behind.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pertcast.errors import DataError, SubmissionError
from pertcast.files.artefacts import (
    Manifest,
    atomic_file,
    hash_file,
    manifest_path,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from pertcast.files.h5ad import open_h5ad
from pertcast.files.lock import claimed
from pertcast.files.origin import prediction_origin
from pertcast.files.season_lists import read_gene_list
from pertcast.files.space import describe_write_error, require_space
from pertcast.progress import SILENT, Advance, Progress
from pertcast.seasons import Season
from pertcast.submission.archive import META, extract_archive
from pertcast.submission.bundle import read_bundle
from pertcast.submission.check import CheckReport
from pertcast.submission.check.whole import Examination, UnreadableError, examination, resolve_season
from pertcast.submission.meta import meta_json
from pertcast.submission.reuse import is_current
from pertcast.submission.slim import is_slim, rewrite_slim
from pertcast.submission.stream import DEFAULT_LEVEL, LEVELS, Packed, StoppedError, estimate_packed, write_archive

__all__ = ["DEFAULT_LEVEL", "pack", "unpack"]

_NORMALISED = "counts were scaled to the median of the cells' totals and log1p was taken, as the official packer does"


def pack(
    path: Path,
    out: Path,
    *,
    season: str | Season,
    genes: Path,
    targets: Path | None = None,
    rules: Mapping[str, object] | None = None,
    force: bool = False,
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
        The archive, a ``.vcc`` file; one that is there and current is kept.
    force
        Whether to replace a file at `out` that pertcast did not write.
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
    >>> import pandas as pd
    >>> from scipy import sparse
    >>> from pertcast.files.csr_writer import CsrWriter
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


class _NotSlimError(Exception):
    """The file has to be rewritten, which only its values tell; the check stands."""

    def __init__(self, report: CheckReport) -> None:
        super().__init__(report)
        self.report = report


class _Job:
    """One prediction to be packed."""

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
        """Return whether the archive is there, whole, and made from just this; tell its notes again then."""
        sources = [path for path in (self._path, self._genes, self._targets) if path is not None]
        if not (self._out.is_file() and manifest_path(self._out).is_file() and all(map(Path.is_file, sources))):
            return False
        inputs = self._inputs(hash_file(self._path))
        if not is_current(self._out, kind="submission", inputs=inputs, config=self._config):
            return False
        for note in (*read_manifest(self._out).notes, f"{self._out} is there and still true"):
            self._progress.note(note)
        return True

    def do(self) -> None:
        """Check and pack: at once where the file is slim already, after rewriting it where not."""
        try:
            opened = examination(self._path, season=self._season, genes=self._genes, targets=self._targets)
            with opened as examined:
                if examined.ok and is_slim(examined.reader, self._season, examined.genes):
                    self._pack_as_it_is(examined)
                    return
                raise _NotSlimError(self._accepted(examined.finish(self._progress)))
        except UnreadableError as error:
            raise self._refused(error.report) from error
        except _NotSlimError as found:
            self._pack_rewritten(found.report)

    def _refused(self, report: CheckReport) -> SubmissionError:
        head = f"{self._path}: not packed, {len(report.problems)} problem(s) found by the check"
        return SubmissionError(head, problems=report.problems)

    def _accepted(self, report: CheckReport) -> CheckReport:
        if not report.ok:
            raise self._refused(report)
        return report

    def _pack_as_it_is(self, examined: Examination) -> None:
        """Compress the file while another thread checks its values."""
        require_space(self._out, estimate_packed(self._path, level=self._level), what="the archive")
        with ThreadPoolExecutor(1) as pool, atomic_file(self._out) as temporary:
            watch = _Watch()
            checking = pool.submit(examined.finish, watch)

            def stop() -> bool:
                return checking.done() and (checking.exception() is not None or not self._stands(checking.result()))

            try:
                meta = self._meta(examined.facts)
                packed = self._write(self._path, temporary, meta, stop)
            except StoppedError:
                packed = None
            except BaseException:
                watch.cancelled.set()
                raise
            report = self._accepted(checking.result())
            if packed is None or not self._stands(report) or not examined.reader.in_order:
                raise _NotSlimError(report)
            self._finish(packed, report, packed.source, report.facts)

    def _stands(self, report: CheckReport) -> bool:
        return report.ok and not self._normalises(report)

    def _normalises(self, report: CheckReport) -> bool:
        return report.facts["scale"] == "counts" and "log1p" in self._season.scales

    def _pack_rewritten(self, report: CheckReport) -> None:
        self._require_space_to_rewrite(report)
        genes = read_gene_list(self._genes, self._season)
        prefix = f".{self._out.name}.partial-"
        with (
            ThreadPoolExecutor(1) as pool,
            atomic_file(self._out) as temporary,
            tempfile.TemporaryDirectory(prefix=prefix, dir=self._out.parent) as folder,
        ):
            hashing = pool.submit(hash_file, self._path)
            source = Path(folder) / "pred.h5ad"
            stored = rewrite_slim(
                self._path,
                source,
                season=self._season,
                genes=genes,
                normalise=self._normalises(report),
                progress=self._progress,
            )
            facts = {**report.facts, "stored_values": stored}
            packed = self._write(source, temporary, self._meta(facts), lambda: False)
            self._finish(packed, report, hashing.result(), facts)

    def _require_space_to_rewrite(self, report: CheckReport) -> None:
        values = int(report.facts["nonzero_values"])  # type: ignore[arg-type]
        require_space(self._out, int(values * 8 * 1.5), what="the rewritten prediction and its archive")

    def _write(self, source: Path, temporary: Path, meta: bytes | None, stop: Callable[[], bool]) -> Packed:
        season, level = self._season, self._level
        return write_archive(
            source, temporary, season=season, level=level, meta=meta, stop=stop, progress=self._progress
        )

    def _meta(self, facts: Mapping[str, Any]) -> bytes | None:
        if META not in self._season.members:
            return None
        return meta_json(self._season, facts=facts, targets=self._targets)

    def _finish(self, packed: Packed, report: CheckReport, prediction: str, facts: Mapping[str, Any]) -> None:
        """Write the manifest; the archive takes its name right after."""
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
            facts={**facts, **prediction_origin(self._path, prediction)},
            notes=tuple(notes),
        )
        write_manifest(self._out, manifest)


class _Watch:
    """The progress of the check in its own thread: silent, and ended where the archive is given up."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:  # noqa: ARG002
        def advance(amount: int, detail: str = "") -> None:  # noqa: ARG001
            if self.cancelled.is_set():
                raise StoppedError

        yield advance

    def note(self, text: str) -> None:
        """Do nothing."""

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""


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
