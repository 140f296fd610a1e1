"""The whole check: all families of rules over one prediction, all problems in one report, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pertcast.errors import DataError, Problem
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.files.season_lists import TargetList, read_gene_list, read_targets
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.seasons import season as season_by_name
from pertcast.submission.bundle import contexts_in_force
from pertcast.submission.check.genes import check_genes
from pertcast.submission.check.labels import check_labels
from pertcast.submission.check.report import CheckItem, CheckReport, Findings, problems_of
from pertcast.submission.check.targets import check_targets, check_zero_targets
from pertcast.submission.check.values import check_values

__all__ = ["check", "resolve_season"]


def resolve_season(season: str | Season, rules: Mapping[str, object]) -> Season:
    """Return a season by name or as it is, with rules overridden."""
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
    rules_in_force = resolve_season(season, rules or {})
    expected = read_gene_list(genes, rules_in_force)
    target_list = None if targets is None else read_targets(targets, rules_in_force)
    rules_in_force, bundle_notes = contexts_in_force(rules_in_force, targets, genes)
    overrides = (*rules_in_force.describe_overrides(), *bundle_notes)
    try:
        with open_h5ad(path) as reader:
            findings = _examine(reader, rules_in_force, expected, genes, target_list, targets, progress)
            facts = {"cells": reader.num_cells, "genes": reader.num_genes}
    except DataError as error:
        return CheckReport(str(path), rules_in_force.name, problems_of(error, str(path)), notes=overrides)
    return CheckReport(
        str(path),
        rules_in_force.name,
        tuple(problem for found in findings for problem in found.problems),
        tuple(item for found in findings for item in found.items),
        facts | {name: fact for found in findings for name, fact in found.facts.items()},
        (*overrides, *(note for found in findings for note in found.notes)),
    )


def _examine(
    reader: H5adReader,
    season: Season,
    expected: tuple[str, ...],
    genes: Path,
    target_list: TargetList | None,
    targets: Path | None,
    progress: Progress,
) -> list[Findings]:
    labels, groups = check_labels(reader, season)
    findings = [
        check_genes(reader.genes, expected, path=reader.path, genes_path=genes),
        labels,
        check_values(reader, season, progress),
        _size(reader, season),
    ]
    if groups is not None:
        name = targets.name if targets else "the target list"
        found = check_targets(groups, season, path=reader.path, genes=expected, targets=target_list, list_name=name)
        findings.append(found)
        zero_rows = next((values.zero_rows for values in findings if values.zero_rows is not None), None)
        if zero_rows is not None:
            findings.append(check_zero_targets(groups, season, zero_rows, path=reader.path))
    elif targets is not None:
        item = CheckItem(f"target list as {targets.name} has it", ok=False, evidence="no labels to compare")
        findings.append(Findings((), (item,)))
    return findings


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
