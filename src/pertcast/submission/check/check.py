"""The check: all families of rules on one prediction, in one report and bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pertcast.errors import DataError, Problem
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.files.season_lists import TargetList, read_gene_list, read_targets
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.seasons import season as season_by_name
from pertcast.submission.check.labels import check_labels
from pertcast.submission.check.report import CheckItem, CheckReport, Findings, problems_of
from pertcast.submission.check.targets import check_genes, check_targets, check_totals, check_zero_targets
from pertcast.submission.check.values import check_values
from pertcast.submission.season_bundle import contexts_in_force


def resolve_season(season: str | Season, rules: Mapping[str, object]) -> Season:
    """Return a season by name or as given, with overridden rules."""
    return season_by_name(season, rules) if isinstance(season, str) else season.override(rules)


def check(
    path: Path,
    *,
    season: str | Season,
    genes: Path,
    targets: Path | None = None,
    rules: Mapping[str, object] | None = None,
    progress: Progress = SILENT,
) -> CheckReport:
    """Return every problem of a prediction, with its place and remedy.

    Parameters
    ----------
    path
        The prediction, an h5ad file.
    season
        Which season's rules hold.
    genes, targets
        The season's gene list, and its target list if the targets are to be checked.
    rules
        Rules overridden by name, for data that is not the challenge's; each is noted in the report.

    Raises
    ------
    ConfigError
        If there is no such season or rule.
    DataError
        If the gene list or the target list is wrong. A wrong prediction is no error: the report says what is wrong.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "genes.csv").write_text("TP53")
    >>> report = check(folder / "lost.h5ad", season="vcc2025", genes=folder / "genes.csv", rules={"num_genes": 1})
    >>> report.ok, report.problems[0].message
    (False, 'no such file')
    """
    in_force = resolve_season(season, rules or {})
    try:
        with examination(path, season=in_force, genes=genes, targets=targets) as examined:
            return examined.finish(progress)
    except UnreadableError as error:
        return error.report


class UnreadableError(DataError):
    """A prediction that cannot be opened, with the report that says so."""

    def __init__(self, report: CheckReport) -> None:
        super().__init__(problems=report.problems)
        self.report = report


class Examination:
    """A running check: labels, genes and sizes are known at once, values after :meth:`finish`."""

    def __init__(self, reader: H5adReader, season: Season, lists: _Lists, notes: tuple[str, ...]) -> None:
        self.reader, self.season, self.genes = reader, season, lists.genes
        self._notes = notes
        genes = check_genes(reader.genes, lists.genes, path=reader.path, genes_path=lists.genes_path)
        labels, self._groups = check_labels(reader, season)
        self._first = [genes, labels]
        self._last = [_size(reader, season)]
        if self._groups is not None:
            found = check_targets(
                self._groups,
                season,
                path=reader.path,
                genes=lists.genes,
                targets=lists.targets,
                list_name=lists.targets_name,
            )
            self._last.append(found)
        elif lists.targets is not None:
            item = CheckItem(f"target list as {lists.targets_name} has it", ok=False, evidence="no labels to compare")
            self._last.append(Findings((), (item,)))

    @property
    def ok(self) -> bool:
        """Whether there is no problem so far."""
        return not any(found.problems for found in (*self._first, *self._last))

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that are known before values are read."""
        size = {"cells": self.reader.num_cells, "genes": self.reader.num_genes, "stored_values": self.reader.num_stored}
        return size | {name: fact for found in (*self._first, *self._last) for name, fact in found.facts.items()}

    def finish(self, progress: Progress) -> CheckReport:
        """Read the values once and return the report."""
        values = check_values(self.reader, self.season, progress)
        findings = [*self._first, values, *self._last]
        if self._groups is not None and values.zero_rows is not None:
            findings.append(check_zero_targets(self._groups, self.season, values.zero_rows, path=self.reader.path))
        if self._groups is not None and values.totals is not None:
            findings.append(check_totals(self._groups, self.season, values.totals))
        return CheckReport(
            str(self.reader.path),
            self.season.name,
            tuple(problem for found in findings for problem in found.problems),
            tuple(item for found in findings for item in found.items),
            self.facts | {name: fact for found in findings for name, fact in found.facts.items()},
            (*self._notes, *(note for found in findings for note in found.notes)),
        )


class _Lists(NamedTuple):
    genes: tuple[str, ...]
    genes_path: Path
    targets: TargetList | None
    targets_name: str


@contextmanager
def examination(path: Path, *, season: Season, genes: Path, targets: Path | None) -> Iterator[Examination]:
    """Open a prediction for a check."""
    expected = read_gene_list(genes, season)
    target_list = None if targets is None else read_targets(targets, season)
    season, bundle_notes = contexts_in_force(season, targets, genes)
    notes = (*season.describe_overrides(), *bundle_notes)
    lists = _Lists(expected, genes, target_list, targets.name if targets else "the target list")
    with ExitStack() as stack:
        try:
            examined = Examination(stack.enter_context(open_h5ad(path)), season, lists, notes)
        except DataError as error:
            raise UnreadableError(
                CheckReport(str(path), season.name, problems_of(error, str(path)), notes=notes)
            ) from error
        yield examined


def _size(reader: H5adReader, season: Season) -> Findings:
    question = f"at most {season.max_cells:,} cells"
    evidence = f"{reader.num_cells:,} cells"
    place = f"{reader.path}, X"
    problems = []
    if reader.num_cells > season.max_cells:
        message = f"expected at most {season.max_cells:,} cells, controls included, got {reader.num_cells:,}"
        problems.append(Problem(place, message, "plan fewer: `pertcast generate` scales targets to the cap"))
    if reader.num_cells == 0:
        problems.append(Problem(place, "there are no cells", "generate some"))
    return Findings(tuple(problems), (CheckItem(question, ok=not problems, evidence=evidence),))
